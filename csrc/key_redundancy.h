// The rule of key_redundancy for one entry of a row of the matrix of cosines.
#pragma once

#include <cstdint>

namespace lil {

// A row drops its entry of the highest rank: the latest key above the threshold; where there is none, the earliest of
// all. At equal ranks, which distinct positions do not have, the later slot.
constexpr int32_t redundancy_rank(float cosine, float threshold, int32_t position) {
  return cosine > threshold ? position : ~position;
}

constexpr float kNormFloor = 1e-8f;  // added to norms: a key of zeros is like none

}  // namespace lil

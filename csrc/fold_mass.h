// The rule of fold_mass for one slot of one head, the same code on every backend.
#pragma once

#include "host_device.h"
#include "params.h"

namespace lil {

// Whether the newest token is the first of what the slot holds.
LIL_HOST_DEVICE inline bool begins(const FoldMassParams& p, int64_t held, int32_t length) {
  return held >= 0 && held * p.page_size + 1 == length;
}

// Of the rules in which no slot depends on another. A sequence of no tokens takes no part, nor, on CUDA, a negative
// length.
LIL_HOST_DEVICE inline float folded(const FoldMassParams& p, float before, float mass, int64_t held, int32_t length) {
  if (length <= 0) return before;
  return p.rule == FoldRule::kLast || begins(p, held, length) ? mass : before + mass;
}

// Rule stamp: whether the slot gets the length as its stamp. `more` slots have more mass, of `count` that hold a page.
LIL_HOST_DEVICE inline bool stamps(const FoldMassParams& p, int64_t held, int32_t length, int64_t more, int64_t count) {
  return length > 0 && held >= 0 &&
         (static_cast<double>(more) < p.share * static_cast<double>(count) || begins(p, held, length));
}

}  // namespace lil

// The information loss: softmax mass of what was not read, from page scores. Everything is in powers of two.
#pragma once

#include "cuda/numbers.cuh"

namespace lil::cuda {

// log2 of what one token of a page with this score weighs; -inf stays so (a page that is not mapped).
__device__ inline float log2_weight(float score, float softcap) {
  // Rounded here: fused with the subtraction of a base, which is rounded, large scores would not cancel.
  return __fmul_rn(softcap > 0 && score != -INFINITY ? softcap * tanhf(score / softcap) : score, kLog2E);
}

// Its sum with other weights is computed relative to 2^this.
__device__ inline float finite_base(float log2_weight) { return isfinite(log2_weight) ? log2_weight : 0; }

// Share of what was not read in the sum of both; what weighs nothing is no loss. What was read: `sum` times 2^`max`.
__device__ inline float lost_share(float max, float sum, float log2_unread) {
  return log2_unread == -INFINITY ? 0 : __fdividef(1, 1 + sum * exp2_approx(max - log2_unread));
}

}  // namespace lil::cuda

// Inline code that the backends share, and bit operations for it. (nvcc compiles some of libstdc++'s <bit> to
// constants.)
#pragma once

#include <bit>
#include <cstdint>

#if defined(__CUDACC__)
#define LIL_HOST_DEVICE __host__ __device__
#else
#define LIL_HOST_DEVICE
#endif

namespace lil {

LIL_HOST_DEVICE constexpr int32_t leading_zeros(uint32_t bits) {
#if defined(__CUDA_ARCH__)
  return __clz(static_cast<int32_t>(bits));
#else
  return std::countl_zero(bits);
#endif
}

// Of bits that are not all 0.
LIL_HOST_DEVICE constexpr int32_t trailing_zeros(uint32_t bits) { return 31 - leading_zeros(bits & (0 - bits)); }

}  // namespace lil

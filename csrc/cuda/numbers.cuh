// Element types and 16-byte vectors of them.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

#include "params.h"

namespace lil::cuda {

// Calls f with a null pointer of the element type.
template <class F>
void with_dtype(DType dtype, F f) {
  switch (dtype) {
    case DType::kFloat32:
      return f(static_cast<const float*>(nullptr));
    case DType::kFloat16:
      return f(static_cast<const __half*>(nullptr));
    case DType::kBFloat16:
      return f(static_cast<const __nv_bfloat16*>(nullptr));
  }
}

__device__ inline float to_float(float x) { return x; }
__device__ inline float to_float(__half x) { return __half2float(x); }
__device__ inline float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }

__device__ inline float load_float(const void* data, DType dtype, int64_t i) {
  switch (dtype) {
    case DType::kFloat32:
      return static_cast<const float*>(data)[i];
    case DType::kFloat16:
      return __half2float(static_cast<const __half*>(data)[i]);
    default:
      return __bfloat162float(static_cast<const __nv_bfloat16*>(data)[i]);
  }
}

__device__ inline void store_float(float x, void* data, DType dtype, int64_t i) {
  switch (dtype) {
    case DType::kFloat32:
      static_cast<float*>(data)[i] = x;
      break;
    case DType::kFloat16:
      static_cast<__half*>(data)[i] = __float2half_rn(x);
      break;
    default:
      static_cast<__nv_bfloat16*>(data)[i] = __float2bfloat16_rn(x);
  }
}

// Minimum and maximum that keep NaN, as torch.amin and torch.amax do.
__device__ inline float min_nan(float a, float b) {
  asm("min.NaN.f32 %0, %1, %2;" : "=f"(a) : "f"(a), "f"(b));
  return a;
}
__device__ inline float max_nan(float a, float b) {
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(a) : "f"(a), "f"(b));
  return a;
}

// One 32-bit word of a vector: a float, or two halves.
template <class T>
__device__ inline uint32_t min_word(uint32_t a, uint32_t b) {
  if constexpr (sizeof(T) == 4) {
    return __float_as_uint(min_nan(__uint_as_float(a), __uint_as_float(b)));
  } else if constexpr (std::is_same_v<T, __half>) {
    asm("min.NaN.f16x2 %0, %1, %2;" : "=r"(a) : "r"(a), "r"(b));
    return a;
  } else {
    asm("min.NaN.bf16x2 %0, %1, %2;" : "=r"(a) : "r"(a), "r"(b));
    return a;
  }
}
template <class T>
__device__ inline uint32_t max_word(uint32_t a, uint32_t b) {
  if constexpr (sizeof(T) == 4) {
    return __float_as_uint(max_nan(__uint_as_float(a), __uint_as_float(b)));
  } else if constexpr (std::is_same_v<T, __half>) {
    asm("max.NaN.f16x2 %0, %1, %2;" : "=r"(a) : "r"(a), "r"(b));
    return a;
  } else {
    asm("max.NaN.bf16x2 %0, %1, %2;" : "=r"(a) : "r"(a), "r"(b));
    return a;
  }
}

template <class T>
__device__ inline uint4 min_vector(uint4 a, uint4 b) {
  return {min_word<T>(a.x, b.x), min_word<T>(a.y, b.y), min_word<T>(a.z, b.z), min_word<T>(a.w, b.w)};
}
template <class T>
__device__ inline uint4 max_vector(uint4 a, uint4 b) {
  return {max_word<T>(a.x, b.x), max_word<T>(a.y, b.y), max_word<T>(a.z, b.z), max_word<T>(a.w, b.w)};
}

// Cached rows are read once: they need not push others out of L1. Volatile keeps the loads where the program has them,
// well ahead of their use.
__device__ inline uint4 load_once(const uint4* p) {
  uint4 v;
  asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "l"(p));
  return v;
}
__device__ inline uint2 load_once(const uint2* p) {
  uint2 v;
  asm volatile("ld.global.nc.L1::no_allocate.v2.u32 {%0, %1}, [%2];" : "=r"(v.x), "=r"(v.y) : "l"(p));
  return v;
}
__device__ inline uint32_t load_once(const uint32_t* p) {
  uint32_t v;
  asm volatile("ld.global.nc.L1::no_allocate.u32 %0, [%1];" : "=r"(v) : "l"(p));
  return v;
}

}  // namespace lil::cuda

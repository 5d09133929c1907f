// Element types and 16-byte vectors of them.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <type_traits>

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

// Packs two floats, `low` in the lower half.
template <class T>
__device__ inline uint32_t pack(float low, float high) {
  uint32_t packed;
  if constexpr (std::is_same_v<T, __half>) {
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
  } else {
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
  }
  return packed;
}

// Elements i to i + 3, i a multiple of 4.
__device__ inline void store_floats(float4 x, void* data, DType dtype, int64_t i) {
  if (dtype == DType::kFloat32) {
    static_cast<float4*>(data)[i / 4] = x;
  } else if (dtype == DType::kFloat16) {
    static_cast<uint2*>(data)[i / 4] = {pack<__half>(x.x, x.y), pack<__half>(x.z, x.w)};
  } else {
    static_cast<uint2*>(data)[i / 4] = {pack<__nv_bfloat16>(x.x, x.y), pack<__nv_bfloat16>(x.z, x.w)};
  }
}

// 2^x, to about 2 ulp; results below the smallest normal number are 0.
__device__ inline float exp2_approx(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
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

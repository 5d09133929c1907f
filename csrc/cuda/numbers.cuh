// Element types and short vectors of them.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_fp8.h>

#include <cstdint>
#include <type_traits>

#include "params.h"

namespace lil::cuda {

constexpr float kLog2E = 1.44269504088896340736f;

using Float8 = __nv_fp8_e4m3;

template <class T>
constexpr bool kIsFloat8 = std::is_same_v<T, Float8>;

// What stored values are multiplied as on tensor cores: float8 as halves, which hold every value of it.
template <class T>
using Computed = std::conditional_t<kIsFloat8<T>, __half, T>;

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
    case DType::kFloat8E4M3:
      return f(static_cast<const Float8*>(nullptr));
  }
}

// Has x computed here: the compiler may compute it later, or again for every load that depends on a condition.
template <class T>
__device__ inline void keep(T*& x) {
  asm volatile("" : "+l"(x));
}

__device__ inline float to_float(float x) { return x; }
__device__ inline float to_float(__half x) { return __half2float(x); }
__device__ inline float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }

__device__ inline float to_float(Float8 x) { return __half2float(__half(__nv_cvt_fp8_to_halfraw(x.__x, __NV_E4M3))); }

// Rounds to nearest; float8 saturates.
template <class T>
__device__ inline T from_float(float x) {
  if constexpr (std::is_same_v<T, __half>) {
    return __float2half_rn(x);
  } else if constexpr (std::is_same_v<T, __nv_bfloat16>) {
    return __float2bfloat16_rn(x);
  } else {
    return T(x);
  }
}

// The float8 value that is not below x, or not above it; NaN where there is none.
__device__ inline Float8 float8_bound(float x, bool above) {
  Float8 y(x);  // the nearest, saturated: what is on the wrong side goes one on, which behind +-448 is NaN
  const float got = to_float(y);
  if (above ? got < x : got > x) y.__x += (x > 0) == above ? 1 : -1;
  return y;
}

// Two float8 values, as halves.
__device__ inline uint32_t widen_pair(uint32_t x) {
  const __half2_raw pair = __nv_cvt_fp8x2_to_halfraw2(static_cast<__nv_fp8x2_storage_t>(x), __NV_E4M3);
  return pair.x | static_cast<uint32_t>(pair.y) << 16;
}

// Two, four or eight stored elements of a row, and what tensor cores take.
template <class T>
struct Stored {
  using Two = uint32_t;
  using Four = uint2;
  using Eight = uint4;
};
template <>
struct Stored<Float8> {
  using Two = uint16_t;
  using Four = uint32_t;
  using Eight = uint2;
};

template <class T>
__device__ inline uint32_t widen2(typename Stored<T>::Two x) {
  if constexpr (kIsFloat8<T>) return widen_pair(x);
  return x;
}
template <class T>
__device__ inline uint2 widen4(typename Stored<T>::Four x) {
  if constexpr (kIsFloat8<T>) {
    return {widen_pair(x & 0xffff), widen_pair(x >> 16)};
  } else {
    return x;
  }
}
template <class T>
__device__ inline uint4 widen8(typename Stored<T>::Eight x) {
  if constexpr (kIsFloat8<T>) {
    return {widen_pair(x.x & 0xffff), widen_pair(x.x >> 16), widen_pair(x.y & 0xffff), widen_pair(x.y >> 16)};
  } else {
    return x;
  }
}

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

// Four halves that float8 holds, as float8.
__device__ inline uint32_t narrow4(uint32_t low, uint32_t high) {
  const auto pair = [](uint32_t x) -> uint32_t {
    const __half2_raw halves{static_cast<unsigned short>(x), static_cast<unsigned short>(x >> 16)};
    return __nv_cvt_halfraw2_to_fp8x2(halves, __NV_SATFINITE, __NV_E4M3);
  };
  return pair(low) | pair(high) << 16;
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

// One 32-bit word of a vector: a float, two halves or four float8 values.
template <class T>
__device__ inline uint32_t min_word(uint32_t a, uint32_t b) {
  if constexpr (kIsFloat8<T>) {
    return narrow4(min_word<__half>(widen_pair(a & 0xffff), widen_pair(b & 0xffff)),
                   min_word<__half>(widen_pair(a >> 16), widen_pair(b >> 16)));
  } else if constexpr (sizeof(T) == 4) {
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
  if constexpr (kIsFloat8<T>) {
    return narrow4(max_word<__half>(widen_pair(a & 0xffff), widen_pair(b & 0xffff)),
                   max_word<__half>(widen_pair(a >> 16), widen_pair(b >> 16)));
  } else if constexpr (sizeof(T) == 4) {
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
__device__ inline uint2 min_vector(uint2 a, uint2 b) {
  return {min_word<T>(a.x, b.x), min_word<T>(a.y, b.y)};
}
template <class T>
__device__ inline uint32_t min_vector(uint32_t a, uint32_t b) {
  return min_word<T>(a, b);
}
template <class T>
__device__ inline uint32_t max_vector(uint32_t a, uint32_t b) {
  return max_word<T>(a, b);
}
template <class T>
__device__ inline uint2 max_vector(uint2 a, uint2 b) {
  return {max_word<T>(a.x, b.x), max_word<T>(a.y, b.y)};
}
template <class T>
__device__ inline uint4 max_vector(uint4 a, uint4 b) {
  return {max_word<T>(a.x, b.x), max_word<T>(a.y, b.y), max_word<T>(a.z, b.z), max_word<T>(a.w, b.w)};
}

// Of shared memory, as assembly takes it.
__device__ inline uint32_t shared_address(const void* p) { return static_cast<uint32_t>(__cvta_generic_to_shared(p)); }

// Asks for a line of L1.
__device__ inline void prefetch(const void* p) { asm volatile("prefetch.global.L1 [%0];" ::"l"(p)); }

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
__device__ inline uint16_t load_once(const uint16_t* p) {
  uint16_t v;
  asm volatile("ld.global.nc.L1::no_allocate.u16 %0, [%1];" : "=h"(v) : "l"(p));
  return v;
}
__device__ inline uint32_t load_once(const uint32_t* p) {
  uint32_t v;
  asm volatile("ld.global.nc.L1::no_allocate.u32 %0, [%1];" : "=r"(v) : "l"(p));
  return v;
}

}  // namespace lil::cuda

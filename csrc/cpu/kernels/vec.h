// Vec: N floats in a register, for the instruction set that this file is compiled for. Loads widen bf16, fp16 and e4m3
// to fp32, stores round to nearest even; e4m3, which has no infinity, saturates. Min and max keep NaN, as torch.amin
// and torch.amax do.
#pragma once

#include <math.h>
#include <stdint.h>
#include <string.h>

#if defined(LIL_ISA_avx2) || defined(LIL_ISA_avx512)
#include <immintrin.h>
#endif

namespace lil::cpu::LIL_ISA {

struct bf16 {
  uint16_t bits;
};
struct f16 {
  uint16_t bits;
};
struct e4m3 {  // sign, 4 bits of exponent, 3 of mantissa; all ones are NaN
  uint8_t bits;
};

// Into L2: what comes next is more than L1 holds.
inline void prefetch(const void* p) { __builtin_prefetch(p, 0, 2); }

#if defined(LIL_ISA_avx512)

struct Vec {
  static constexpr int N = 16;
  static constexpr int kHeadTile = 4;  // 4 tokens x 4 heads of accumulators leave room for the operands
  __m512 v;

  static Vec zero() { return {_mm512_setzero_ps()}; }
  static Vec set1(float x) { return {_mm512_set1_ps(x)}; }
  static Vec load(const float* p) { return {_mm512_loadu_ps(p)}; }
  static Vec load(const bf16* p) {
    const __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
    return {_mm512_castsi512_ps(_mm512_slli_epi32(wide, 16))};
  }
  static Vec load(const f16* p) { return {_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)))}; }
  // As fp16, times 2^8: subnormals come out right, and cost no more. NaN alone carries into the top exponent bit.
  static Vec load(const e4m3* p) {
    const __m256i wide = _mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
    const __m256i half = _mm256_and_si256(_mm256_slli_epi16(wide, 7), _mm256_set1_epi16(static_cast<int16_t>(0xbf80)));
    const __m256i carry = _mm256_add_epi16(half, _mm256_set1_epi16(0x80));
    const __m256i kept = _mm256_or_si256(half, _mm256_and_si256(carry, _mm256_set1_epi16(0x4000)));
    return {_mm512_mul_ps(_mm512_cvtph_ps(kept), _mm512_set1_ps(0x1p8f))};
  }
  void store(float* p) const { _mm512_storeu_ps(p, v); }
  void store(bf16* p) const {
    const __m512i x = _mm512_castps_si512(v);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(x, 16), _mm512_set1_epi32(1));
    __m512i rounded = _mm512_srli_epi32(_mm512_add_epi32(x, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff))), 16);
    rounded = _mm512_mask_mov_epi32(rounded, _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q), _mm512_set1_epi32(0x7fc0));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtepi32_epi16(rounded));
  }
  void store(f16* p) const {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
  }
  // See narrow(float, e4m3*).
  void store(e4m3* p) const {
    const __m512 magnitude = _mm512_min_ps(_mm512_abs_ps(v), _mm512_set1_ps(448));
    const __m512i m = _mm512_sub_epi32(_mm512_castps_si512(magnitude), _mm512_set1_epi32(120 << 23));
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(m, 20), _mm512_set1_epi32(1));
    const __m512i normal =
        _mm512_srli_epi32(_mm512_add_epi32(m, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7ffff))), 20);
    const __m512 shift = _mm512_set1_ps(0x1p14f);
    const __m512i subnormal =
        _mm512_sub_epi32(_mm512_castps_si512(_mm512_add_ps(magnitude, shift)), _mm512_castps_si512(shift));
    __m512i bits =
        _mm512_mask_mov_epi32(normal, _mm512_cmp_ps_mask(magnitude, _mm512_set1_ps(0x1p-6f), _CMP_LT_OQ), subnormal);
    bits = _mm512_mask_mov_epi32(bits, _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q), _mm512_set1_epi32(0x7f));
    const __m512i sign = _mm512_and_si512(_mm512_srli_epi32(_mm512_castps_si512(v), 24), _mm512_set1_epi32(0x80));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtepi32_epi8(_mm512_or_si512(bits, sign)));
  }
  static Vec fma(Vec a, Vec b, Vec c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
  // max_ps returns its second operand when either is NaN; the blend keeps a NaN that was in the first.
  static Vec max(Vec a, Vec b) {
    return {_mm512_mask_mov_ps(_mm512_max_ps(a.v, b.v), _mm512_cmp_ps_mask(a.v, a.v, _CMP_UNORD_Q), a.v)};
  }
  static Vec min(Vec a, Vec b) {
    return {_mm512_mask_mov_ps(_mm512_min_ps(a.v, b.v), _mm512_cmp_ps_mask(a.v, a.v, _CMP_UNORD_Q), a.v)};
  }
  static Vec round(Vec a) { return {_mm512_roundscale_ps(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)}; }
  static Vec scale2(Vec a, Vec n) { return {_mm512_scalef_ps(a.v, n.v)}; }
  static Vec sqrt(Vec a) { return {_mm512_sqrt_ps(a.v)}; }
  float sum() const { return _mm512_reduce_add_ps(v); }
  float largest() const { return _mm512_reduce_max_ps(v); }
  // Bit i: lane i is not less than b's, or equal to it. NaN is not less than anything, and equal to nothing.
  uint32_t not_less(Vec b) const { return _mm512_cmp_ps_mask(v, b.v, _CMP_NLT_UQ); }
  uint32_t equal(Vec b) const { return _mm512_cmp_ps_mask(v, b.v, _CMP_EQ_OQ); }
  // out[i] = sum of the i-th vector
  static void sum4(const Vec* a, float* out) {
    const __m512 s01 = _mm512_add_ps(_mm512_unpacklo_ps(a[0].v, a[1].v), _mm512_unpackhi_ps(a[0].v, a[1].v));
    const __m512 s23 = _mm512_add_ps(_mm512_unpacklo_ps(a[2].v, a[3].v), _mm512_unpackhi_ps(a[2].v, a[3].v));
    const __m512d lo = _mm512_unpacklo_pd(_mm512_castps_pd(s01), _mm512_castps_pd(s23));
    const __m512d hi = _mm512_unpackhi_pd(_mm512_castps_pd(s01), _mm512_castps_pd(s23));
    const __m512 lanes = _mm512_add_ps(_mm512_castpd_ps(lo), _mm512_castpd_ps(hi));
    const __m256 half = _mm256_add_ps(_mm512_castps512_ps256(lanes), _mm512_extractf32x8_ps(lanes, 1));
    _mm_storeu_ps(out, _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1)));
  }
};
inline Vec operator+(Vec a, Vec b) { return {_mm512_add_ps(a.v, b.v)}; }
inline Vec operator-(Vec a, Vec b) { return {_mm512_sub_ps(a.v, b.v)}; }
inline Vec operator*(Vec a, Vec b) { return {_mm512_mul_ps(a.v, b.v)}; }
inline Vec operator/(Vec a, Vec b) { return {_mm512_div_ps(a.v, b.v)}; }

#elif defined(LIL_ISA_avx2)

struct Vec {
  static constexpr int N = 8;
  static constexpr int kHeadTile = 2;
  __m256 v;

  static Vec zero() { return {_mm256_setzero_ps()}; }
  static Vec set1(float x) { return {_mm256_set1_ps(x)}; }
  static Vec load(const float* p) { return {_mm256_loadu_ps(p)}; }
  static Vec load(const bf16* p) {
    const __m256i wide = _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
    return {_mm256_castsi256_ps(_mm256_slli_epi32(wide, 16))};
  }
  static Vec load(const f16* p) { return {_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)))}; }
  // As fp16, times 2^8: subnormals come out right, and cost no more. NaN alone carries into the top exponent bit.
  static Vec load(const e4m3* p) {
    const __m128i wide = _mm_cvtepi8_epi16(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
    const __m128i half = _mm_and_si128(_mm_slli_epi16(wide, 7), _mm_set1_epi16(static_cast<int16_t>(0xbf80)));
    const __m128i carry = _mm_add_epi16(half, _mm_set1_epi16(0x80));
    const __m128i kept = _mm_or_si128(half, _mm_and_si128(carry, _mm_set1_epi16(0x4000)));
    return {_mm256_mul_ps(_mm256_cvtph_ps(kept), _mm256_set1_ps(0x1p8f))};
  }
  void store(float* p) const { _mm256_storeu_ps(p, v); }
  void store(bf16* p) const {
    const __m256i x = _mm256_castps_si256(v);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(x, 16), _mm256_set1_epi32(1));
    __m256i rounded = _mm256_srli_epi32(_mm256_add_epi32(x, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff))), 16);
    const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(v, v, _CMP_UNORD_Q));
    rounded = _mm256_blendv_epi8(rounded, _mm256_set1_epi32(0x7fc0), nan);
    const __m128i packed = _mm_packus_epi32(_mm256_castsi256_si128(rounded), _mm256_extracti128_si256(rounded, 1));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), packed);
  }
  void store(f16* p) const {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
  }
  // See narrow(float, e4m3*).
  void store(e4m3* p) const {
    const __m256i x = _mm256_castps_si256(v);
    const __m256 positive = _mm256_castsi256_ps(_mm256_and_si256(x, _mm256_set1_epi32(0x7fffffff)));
    const __m256 magnitude = _mm256_min_ps(positive, _mm256_set1_ps(448));
    const __m256i m = _mm256_sub_epi32(_mm256_castps_si256(magnitude), _mm256_set1_epi32(120 << 23));
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(m, 20), _mm256_set1_epi32(1));
    const __m256i normal =
        _mm256_srli_epi32(_mm256_add_epi32(m, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7ffff))), 20);
    const __m256 shift = _mm256_set1_ps(0x1p14f);
    const __m256i subnormal =
        _mm256_sub_epi32(_mm256_castps_si256(_mm256_add_ps(magnitude, shift)), _mm256_castps_si256(shift));
    const __m256i small = _mm256_castps_si256(_mm256_cmp_ps(magnitude, _mm256_set1_ps(0x1p-6f), _CMP_LT_OQ));
    __m256i bits = _mm256_blendv_epi8(normal, subnormal, small);
    const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(v, v, _CMP_UNORD_Q));
    bits = _mm256_blendv_epi8(bits, _mm256_set1_epi32(0x7f), nan);
    bits = _mm256_or_si256(bits, _mm256_and_si256(_mm256_srli_epi32(x, 24), _mm256_set1_epi32(0x80)));
    const __m128i words = _mm_packus_epi32(_mm256_castsi256_si128(bits), _mm256_extracti128_si256(bits, 1));
    _mm_storel_epi64(reinterpret_cast<__m128i*>(p), _mm_packus_epi16(words, words));
  }
  static Vec fma(Vec a, Vec b, Vec c) { return {_mm256_fmadd_ps(a.v, b.v, c.v)}; }
  static Vec max(Vec a, Vec b) {
    return {_mm256_blendv_ps(_mm256_max_ps(a.v, b.v), a.v, _mm256_cmp_ps(a.v, a.v, _CMP_UNORD_Q))};
  }
  static Vec min(Vec a, Vec b) {
    return {_mm256_blendv_ps(_mm256_min_ps(a.v, b.v), a.v, _mm256_cmp_ps(a.v, a.v, _CMP_UNORD_Q))};
  }
  static Vec round(Vec a) { return {_mm256_round_ps(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)}; }
  static Vec scale2(Vec a, Vec n) {
    const __m256i exponent = _mm256_add_epi32(_mm256_cvtps_epi32(n.v), _mm256_set1_epi32(127));
    return {_mm256_mul_ps(a.v, _mm256_castsi256_ps(_mm256_slli_epi32(exponent, 23)))};
  }
  static Vec sqrt(Vec a) { return {_mm256_sqrt_ps(a.v)}; }
  float sum() const {
    const __m128 half = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    const __m128 pair = _mm_add_ps(half, _mm_movehl_ps(half, half));
    return _mm_cvtss_f32(_mm_add_ss(pair, _mm_movehdup_ps(pair)));
  }
  uint32_t not_less(Vec b) const { return _mm256_movemask_ps(_mm256_cmp_ps(v, b.v, _CMP_NLT_UQ)); }
  uint32_t equal(Vec b) const { return _mm256_movemask_ps(_mm256_cmp_ps(v, b.v, _CMP_EQ_OQ)); }
  float largest() const {
    const __m128 half = _mm_max_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    const __m128 pair = _mm_max_ps(half, _mm_movehl_ps(half, half));
    return _mm_cvtss_f32(_mm_max_ss(pair, _mm_movehdup_ps(pair)));
  }
  static void sum4(const Vec* a, float* out) {
    const __m256 lanes = _mm256_hadd_ps(_mm256_hadd_ps(a[0].v, a[1].v), _mm256_hadd_ps(a[2].v, a[3].v));
    _mm_storeu_ps(out, _mm_add_ps(_mm256_castps256_ps128(lanes), _mm256_extractf128_ps(lanes, 1)));
  }
};
inline Vec operator+(Vec a, Vec b) { return {_mm256_add_ps(a.v, b.v)}; }
inline Vec operator-(Vec a, Vec b) { return {_mm256_sub_ps(a.v, b.v)}; }
inline Vec operator*(Vec a, Vec b) { return {_mm256_mul_ps(a.v, b.v)}; }
inline Vec operator/(Vec a, Vec b) { return {_mm256_div_ps(a.v, b.v)}; }

#else

inline uint32_t float_bits(float x) {
  uint32_t bits;
  memcpy(&bits, &x, sizeof bits);
  return bits;
}
inline float bits_float(uint32_t bits) {
  float x;
  memcpy(&x, &bits, sizeof x);
  return x;
}

inline float widen(float x) { return x; }
inline float widen(bf16 x) { return bits_float(static_cast<uint32_t>(x.bits) << 16); }
inline float widen(f16 x) {
  const uint32_t sign = (x.bits & 0x8000u) << 16, rest = x.bits & 0x7fffu;
  if (rest >= 0x7c00u) return bits_float(sign | 0x7f800000u | (rest & 0x3ffu) << 13);
  // Adding the exponent's difference by a multiplication makes subnormals come out right as well.
  return bits_float(sign | float_bits(bits_float(rest << 13) * 0x1p112f));
}
inline float widen(e4m3 x) {
  const uint32_t sign = (x.bits & 0x80u) << 24, rest = x.bits & 0x7fu;
  const uint32_t nan = rest == 0x7fu ? 0x7fc00000u : 0;
  return bits_float(sign | nan | float_bits(bits_float(rest << 20) * 0x1p120f));
}
inline void narrow(float x, float* p) { *p = x; }
inline void narrow(float x, bf16* p) {
  const uint32_t bits = float_bits(x);
  p->bits = x != x ? 0x7fc0 : static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}
inline void narrow(float x, f16* p) {
  const uint32_t bits = float_bits(x), sign = bits >> 16 & 0x8000u;
  float magnitude = bits_float(bits & 0x7fffffffu);
  if (x != x) {
    p->bits = static_cast<uint16_t>(sign | 0x7e00u);
  } else if (magnitude >= 65520.0f) {
    p->bits = static_cast<uint16_t>(sign | 0x7c00u);
  } else if (magnitude < 0x1p-14f) {  // a subnormal result: fp32 addition rounds at the right bit
    p->bits = static_cast<uint16_t>(sign | (float_bits(magnitude + 0.5f) - float_bits(0.5f)));
  } else {
    const uint32_t m = float_bits(magnitude) - (112u << 23);
    p->bits = static_cast<uint16_t>(sign | (m + 0xfff + (m >> 13 & 1)) >> 13);
  }
}
inline void narrow(float x, e4m3* p) {
  const uint32_t bits = float_bits(x), sign = bits >> 24 & 0x80u;
  float magnitude = bits_float(bits & 0x7fffffffu);
  magnitude = magnitude < 448.0f ? magnitude : 448.0f;
  if (x != x) {
    p->bits = static_cast<uint8_t>(sign | 0x7fu);
  } else if (magnitude < 0x1p-6f) {  // a subnormal result
    p->bits = static_cast<uint8_t>(sign | (float_bits(magnitude + 0x1p14f) - float_bits(0x1p14f)));
  } else {
    const uint32_t m = float_bits(magnitude) - (120u << 23);
    p->bits = static_cast<uint8_t>(sign | (m + 0x7ffff + (m >> 20 & 1)) >> 20);
  }
}

struct Vec {
  static constexpr int N = 8;
  static constexpr int kHeadTile = 2;
  float v[N];

  template <class F>
  static Vec each(F f) {
    Vec r;
    for (int i = 0; i < N; ++i) r.v[i] = f(i);
    return r;
  }
  static Vec zero() { return set1(0); }
  static Vec set1(float x) {
    return each([&](int) { return x; });
  }
  template <class T>
  static Vec load(const T* p) {
    return each([&](int i) { return widen(p[i]); });
  }
  template <class T>
  void store(T* p) const {
    for (int i = 0; i < N; ++i) narrow(v[i], p + i);
  }
  static Vec fma(Vec a, Vec b, Vec c) {
    return each([&](int i) { return a.v[i] * b.v[i] + c.v[i]; });
  }
  static Vec max(Vec a, Vec b) {
    return each([&](int i) { return a.v[i] > b.v[i] || a.v[i] != a.v[i] ? a.v[i] : b.v[i]; });
  }
  static Vec min(Vec a, Vec b) {
    return each([&](int i) { return a.v[i] < b.v[i] || a.v[i] != a.v[i] ? a.v[i] : b.v[i]; });
  }
  static Vec round(Vec a) {
    return each([&](int i) { return rintf(a.v[i]); });
  }
  static Vec scale2(Vec a, Vec n) {
    return each([&](int i) { return a.v[i] * bits_float((static_cast<int32_t>(n.v[i]) + 127) << 23); });
  }
  static Vec sqrt(Vec a) {
    return each([&](int i) { return sqrtf(a.v[i]); });
  }
  float sum() const { return ((v[0] + v[4]) + (v[1] + v[5])) + ((v[2] + v[6]) + (v[3] + v[7])); }
  uint32_t not_less(Vec b) const {
    uint32_t mask = 0;
    for (int i = 0; i < N; ++i) mask |= static_cast<uint32_t>(!(v[i] < b.v[i])) << i;
    return mask;
  }
  uint32_t equal(Vec b) const {
    uint32_t mask = 0;
    for (int i = 0; i < N; ++i) mask |= static_cast<uint32_t>(v[i] == b.v[i]) << i;
    return mask;
  }
  float largest() const {
    float m = v[0];
    for (int i = 1; i < N; ++i) m = v[i] > m ? v[i] : m;
    return m;
  }
  static void sum4(const Vec* a, float* out) {
    for (int i = 0; i < 4; ++i) out[i] = a[i].sum();
  }
};
inline Vec operator+(Vec a, Vec b) {
  return Vec::each([&](int i) { return a.v[i] + b.v[i]; });
}
inline Vec operator-(Vec a, Vec b) {
  return Vec::each([&](int i) { return a.v[i] - b.v[i]; });
}
inline Vec operator*(Vec a, Vec b) {
  return Vec::each([&](int i) { return a.v[i] * b.v[i]; });
}
inline Vec operator/(Vec a, Vec b) {
  return Vec::each([&](int i) { return a.v[i] / b.v[i]; });
}

#endif

// e^x = 2^n (1 + r + r pr), where |r| is about half of log 2 at most. NaN stays NaN.
struct Power {
  Vec n, r, pr;

  explicit Power(Vec x) : n(Vec::round(x * Vec::set1(1.44269504089f))) {
    r = Vec::fma(n, Vec::set1(-0.693359375f), x);
    r = Vec::fma(n, Vec::set1(2.12194440e-4f), r);
    Vec p = Vec::set1(1.9875691500e-4f);
    constexpr float kTerms[] = {1.3981999507e-3f, 8.3334519073e-3f, 4.1665795894e-2f, 1.6666665459e-1f,
                                5.0000001201e-1f};
    for (const float c : kTerms) {
      p = Vec::fma(p, r, Vec::set1(c));
    }
    pr = p * r;
  }
};

// e^x to about 1 ulp for x <= 88; x below -87.3 gives e^-87.3, which no sum of exponentials up to e^0 notices.
inline Vec exp(Vec x) {
  const Power e(Vec::max(x, Vec::set1(-87.3f)));
  return Vec::scale2(Vec::fma(e.pr, e.r, e.r + Vec::set1(1.0f)), e.n);
}

// (e^2x - 1) / (e^2x + 1), by e^2x - 1 as it is for small x, without the 1; beyond |x| = 15 fp32 has no value between
// tanh x and 1.
inline Vec tanh(Vec x) {
  const Vec clamped = Vec::min(Vec::max(x, Vec::set1(-15.0f)), Vec::set1(15.0f));
  const Power e(clamped + clamped);
  const Vec scale = Vec::scale2(Vec::set1(1.0f), e.n);
  const Vec less_one = Vec::fma(scale, Vec::fma(e.pr, e.r, e.r), scale - Vec::set1(1.0f));
  return less_one / (less_one + Vec::set1(2.0f));
}

}  // namespace lil::cpu::LIL_ISA

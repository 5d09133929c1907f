#include "cpu/kernels/dot.h"
#include "cpu/kernels/table.h"

namespace lil::cpu::LIL_ISA {
namespace {

// Beyond -88, where it is 0 beside every other number, exp would overflow.
inline Vec silu(Vec x) { return x / (Vec::set1(1) + exp(Vec::min(Vec::zero() - x, Vec::set1(88)))); }

}  // namespace

void linear_input(const DecodeLinearParams& p, float* x) {
  with_dtype(p.dtype, [&]<class T>(const T*) {
    const T* const norm = static_cast<const T*>(p.norm);
    for (int64_t row = 0; row < p.rows; ++row) {
      const T* const from = static_cast<const T*>(p.x) + row * p.in_features;
      float* const to = x + row * p.in_features;
      Vec squares = Vec::zero();
      for (int64_t i = 0; i < p.in_features; i += Vec::N) {
        const Vec v = Vec::load(from + i);
        squares = Vec::fma(v, v, squares);
        v.store(to + i);
      }
      if (!norm) continue;
      const Vec mean = Vec::set1(squares.sum() / static_cast<float>(p.in_features) + p.eps);
      const Vec scale = Vec::set1(1) / Vec::sqrt(mean);
      for (int64_t i = 0; i < p.in_features; i += Vec::N) {
        (Vec::load(to + i) * scale * Vec::load(norm + i)).store(to + i);
      }
    }
  });
}

void linear_outputs(const DecodeLinearParams& p, const float* x, int64_t begin, int64_t end) {
  constexpr int64_t kOutputs = kLinearOutputs;
  with_dtype(p.dtype, [&]<class T>(const T*) {
    const T* const weight = static_cast<const T*>(p.weight);
    const int64_t count = p.gated ? 2 * kOutputs : kOutputs;
    for (int64_t block = begin; block < end; ++block) {
      const int64_t first = block * kOutputs;
      const T* rows[2 * kOutputs];
      for (int64_t i = 0; i < count; ++i) {
        rows[i] = weight + (i < kOutputs ? first + i : p.out_features + first + i - kOutputs) * p.in_features;
      }
      float sums[kMaxLinearRows * 2 * kOutputs];
      dots(rows, count, x, p.rows, p.in_features, sums, count, Ahead<T>{rows, 0});
      for (int64_t row = 0; row < p.rows; ++row) {
        const float* const got = sums + row * count;
        for (int64_t i = 0; i < kOutputs; i += Vec::N) {
          const int64_t at = row * p.out_features + first + i;
          Vec v = Vec::load(got + i);
          if (p.gated) v = silu(v) * Vec::load(got + kOutputs + i);
          if (p.bias) v = v + Vec::load(static_cast<const T*>(p.bias) + first + i);
          if (p.residual) v = v + Vec::load(static_cast<const T*>(p.residual) + at);
          v.store(static_cast<T*>(p.out) + at);
        }
      }
    }
  });
}

}  // namespace lil::cpu::LIL_ISA

#include "cpu/kernels/dot.h"
#include "cpu/kernels/table.h"

namespace lil::cpu::LIL_ISA {
namespace {

// Beyond -88, where it is 0 beside every other number, exp would overflow.
inline Vec silu(Vec x) { return x / (Vec::set1(1) + exp(Vec::min(Vec::zero() - x, Vec::set1(88)))); }

// The outputs of a block: kLinearOutputs from `first` on, and, where they need as many others, those `apart` further
// on.
struct Block {
  int64_t first, apart;

  Block(const DecodeLinearParams& p, int64_t block) {
    const int64_t half = p.head_dim / 2, a_head = half / kLinearOutputs;
    if (block < p.rotated / 2 / kLinearOutputs) {
      first = block / a_head * p.head_dim + block % a_head * kLinearOutputs;
      apart = half;
    } else {
      first = p.rotated / 2 + block * kLinearOutputs;
      apart = p.gated ? p.out_features : 0;
    }
  }
};

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
    for (int64_t number = begin; number < end; ++number) {
      const Block block(p, number);
      const int64_t count = block.apart ? 2 * kOutputs : kOutputs;
      const T* rows[2 * kOutputs];
      for (int64_t i = 0; i < count; ++i) {
        rows[i] = weight + (block.first + (i < kOutputs ? i : block.apart + i - kOutputs)) * p.in_features;
      }
      float sums[kMaxLinearRows * 2 * kOutputs];
      dots(rows, count, x, p.rows, p.in_features, sums, count, Ahead<T>{rows, 0});
      for (int64_t row = 0; row < p.rows; ++row) {
        const float* const got = sums + row * count;
        const auto with_bias = [&](Vec v, int64_t output) {
          return p.bias ? v + Vec::load(static_cast<const T*>(p.bias) + output) : v;
        };
        const auto write = [&](Vec v, int64_t output) {
          const int64_t at = row * p.out_features + output;
          if (p.residual) v = v + Vec::load(static_cast<const T*>(p.residual) + at);
          v.store(static_cast<T*>(p.out) + at);
        };
        for (int64_t i = 0; i < kOutputs; i += Vec::N) {
          const int64_t output = block.first + i;
          const Vec v = Vec::load(got + i);
          if (p.gated) {
            write(silu(v) * Vec::load(got + kOutputs + i), output);
          } else if (!block.apart) {
            write(with_bias(v, output), output);
          } else {
            const int64_t angle = row * p.head_dim + output % p.head_dim, other = angle + block.apart;
            const T *const cos = static_cast<const T*>(p.cos), *const sin = static_cast<const T*>(p.sin);
            const Vec a = with_bias(v, output), b = with_bias(Vec::load(got + kOutputs + i), output + block.apart);
            write(a * Vec::load(cos + angle) - b * Vec::load(sin + angle), output);
            write(b * Vec::load(cos + other) + a * Vec::load(sin + other), output + block.apart);
          }
        }
      }
    }
  });
}

}  // namespace lil::cpu::LIL_ISA

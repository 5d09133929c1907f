// Dot products of a few query vectors with many cached rows: the inner loop of scoring and of attention's first half.
#pragma once

#include "cpu/kernels/vec.h"
#include "params.h"

namespace lil::cpu::LIL_ISA {

// Calls f with a null pointer of the element type, which is none that is only stored.
template <class F>
inline void with_dtype(DType dtype, F f) {
  switch (dtype) {
    case DType::kFloat32:
      return f(static_cast<const float*>(nullptr));
    case DType::kFloat16:
      return f(static_cast<const f16*>(nullptr));
    case DType::kBFloat16:
      return f(static_cast<const bf16*>(nullptr));
    case DType::kFloat8E4M3:
      return;
  }
}

// The same for caches and summaries.
template <class F>
inline void with_stored_dtype(DType dtype, F f) {
  dtype == DType::kFloat8E4M3 ? f(static_cast<const e4m3*>(nullptr)) : with_dtype(dtype, f);
}

// Query heads from `first` on, `stride` apart, times scale: [heads, head_dim].
inline void load_queries(const void* q, DType dtype, int64_t first, int64_t stride, int64_t heads, int64_t head_dim,
                         float scale, float* out) {
  with_dtype(dtype, [&]<class Q>(const Q*) {
    for (int64_t i = 0; i < heads; ++i) {
      const Q* row = static_cast<const Q*>(q) + first + i * stride;
      for (int64_t d = 0; d < head_dim; d += Vec::N) {
        (Vec::load(row + d) * Vec::set1(scale)).store(out + i * head_dim + d);
      }
    }
  });
}

// out[h * out_stride + t] = queries[h] . rows[t], rows Tokens x Heads at a time in registers. Squares: of the rows'
// elements.
template <int Tokens, int Heads, bool Squares, class T>
inline void dot_tile(const T* const* rows, const float* queries, int64_t length, float* out, int64_t out_stride) {
  Vec acc[Heads][Tokens];
  for (auto& head : acc) {
    for (Vec& a : head) a = Vec::zero();
  }
  for (int64_t d = 0; d < length; d += Vec::N) {
    Vec row[Tokens];
    for (int t = 0; t < Tokens; ++t) {
      row[t] = Vec::load(rows[t] + d);
      if constexpr (Squares) row[t] = row[t] * row[t];
    }
    for (int h = 0; h < Heads; ++h) {
      const Vec query = Vec::load(queries + h * length + d);
      for (int t = 0; t < Tokens; ++t) acc[h][t] = Vec::fma(query, row[t], acc[h][t]);
    }
  }
  for (int h = 0; h < Heads; ++h) {
    if constexpr (Tokens == 4) {
      Vec::sum4(acc[h], out + h * out_stride);
    } else {
      for (int t = 0; t < Tokens; ++t) out[h * out_stride + t] = acc[h][t].sum();
    }
  }
}

// Rows that are needed next. Row pointers may lead anywhere (pages are scattered), which no hardware foresees: so while
// one piece is computed with, the rows of the piece after it are fetched, a row for each row.
template <class T>
struct Ahead {
  const T* const* rows;
  int64_t count;

  // Elements [first, last) of rows [begin, end).
  void fetch(int64_t begin, int64_t end, int64_t first, int64_t last) const {
    for (int64_t t = begin; t < end && t < count; ++t) {
      for (int64_t d = first; d < last; d += 64 / sizeof(T)) prefetch(rows[t] + d);
    }
  }
};

// Never inlined: its registers and its vectorisation must not depend on what is around it.
template <int Heads, bool Squares, class T>
[[gnu::noinline]] void dot_rows(const T* const* rows, int64_t count, const float* queries, int64_t length, float* out,
                                int64_t out_stride, Ahead<T> ahead) {
  int64_t t = 0;
  for (; t + 4 <= count; t += 4) {
    ahead.fetch(t, t + 4, 0, length);
    dot_tile<4, Heads, Squares>(rows + t, queries, length, out + t, out_stride);
  }
  ahead.fetch(t, ahead.count, 0, length);
  for (; t < count; ++t) dot_tile<1, Heads, Squares>(rows + t, queries, length, out + t, out_stride);
}

// Any number of queries [heads, length], Vec::kHeadTile at a time; `ahead`, of the same length, is fetched meanwhile.
template <bool Squares = false, class T>
inline void dots(const T* const* rows, int64_t count, const float* queries, int64_t heads, int64_t length, float* out,
                 int64_t out_stride, Ahead<T> ahead) {
  while (heads > 0) {
    const int64_t tile = heads < Vec::kHeadTile ? heads : Vec::kHeadTile;
    switch (tile) {
      case 4:
        dot_rows<4, Squares>(rows, count, queries, length, out, out_stride, ahead);
        break;
      case 3:
        dot_rows<3, Squares>(rows, count, queries, length, out, out_stride, ahead);
        break;
      case 2:
        dot_rows<2, Squares>(rows, count, queries, length, out, out_stride, ahead);
        break;
      default:
        dot_rows<1, Squares>(rows, count, queries, length, out, out_stride, ahead);
    }
    ahead.count = 0;
    heads -= tile;
    queries += tile * length;
    out += tile * out_stride;
  }
}

}  // namespace lil::cpu::LIL_ISA

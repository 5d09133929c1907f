// Dot products of a few query vectors with many cached rows: the inner loop of scoring and of attention's first half.
#pragma once

#include "cpu/kernels/vec.h"
#include "params.h"

namespace lil::cpu::LIL_ISA {

// Calls f with a null pointer of the element type.
template <class F>
inline void with_dtype(DType dtype, F f) {
  switch (dtype) {
    case DType::kFloat32:
      return f(static_cast<const float*>(nullptr));
    case DType::kFloat16:
      return f(static_cast<const f16*>(nullptr));
    case DType::kBFloat16:
      return f(static_cast<const bf16*>(nullptr));
  }
}

// out[h * out_stride + t] = queries[h] . rows[t], rows Tokens x Heads at a time in registers.
template <int Tokens, int Heads, class T>
inline void dot_tile(const T* const* rows, const float* queries, int64_t length, float* out, int64_t out_stride) {
  Vec acc[Heads][Tokens];
  for (auto& head : acc) {
    for (Vec& a : head) a = Vec::zero();
  }
  for (int64_t d = 0; d < length; d += Vec::N) {
    Vec row[Tokens];
    for (int t = 0; t < Tokens; ++t) row[t] = Vec::load(rows[t] + d);
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

template <int Heads, class T>
inline void dot_rows(const T* const* rows, int64_t count, const float* queries, int64_t length, float* out,
                     int64_t out_stride, Ahead<T> ahead) {
  int64_t t = 0;
  for (; t + 4 <= count; t += 4) {
    ahead.fetch(t, t + 4, 0, length);
    dot_tile<4, Heads>(rows + t, queries, length, out + t, out_stride);
  }
  ahead.fetch(t, ahead.count, 0, length);
  for (; t < count; ++t) dot_tile<1, Heads>(rows + t, queries, length, out + t, out_stride);
}

// Any number of queries [heads, length], Vec::kHeadTile at a time; `ahead`, of the same length, is fetched meanwhile.
template <class T>
inline void dots(const T* const* rows, int64_t count, const float* queries, int64_t heads, int64_t length, float* out,
                 int64_t out_stride, Ahead<T> ahead) {
  while (heads > 0) {
    const int64_t tile = heads < Vec::kHeadTile ? heads : Vec::kHeadTile;
    switch (tile) {
      case 4:
        dot_rows<4>(rows, count, queries, length, out, out_stride, ahead);
        break;
      case 3:
        dot_rows<3>(rows, count, queries, length, out, out_stride, ahead);
        break;
      case 2:
        dot_rows<2>(rows, count, queries, length, out, out_stride, ahead);
        break;
      default:
        dot_rows<1>(rows, count, queries, length, out, out_stride, ahead);
    }
    ahead.count = 0;
    heads -= tile;
    queries += tile * length;
    out += tile * out_stride;
  }
}

}  // namespace lil::cpu::LIL_ISA

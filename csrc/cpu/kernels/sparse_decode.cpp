#include "cpu/kernels/dot.h"
#include "cpu/kernels/table.h"

namespace lil::cpu::LIL_ISA {
namespace {

constexpr int64_t kMaxHeadDim = 256;

// out[h, d] = sum_t weights[h * kChunkTokens + t] * rows[t][d], for Width vectors from d on.
template <int Heads, int Width, class T>
inline void weigh_tile(const T* const* rows, int64_t count, const float* weights, int64_t d, int64_t head_dim,
                       float* out, Ahead<T> ahead) {
  Vec acc[Heads][Width];
  for (auto& head : acc) {
    for (Vec& a : head) a = Vec::zero();
  }
  for (int64_t t = 0; t < count; ++t) {
    ahead.fetch(t, t + 1, d, d + Width * Vec::N);
    Vec row[Width];
    for (int w = 0; w < Width; ++w) row[w] = Vec::load(rows[t] + d + w * Vec::N);
    for (int h = 0; h < Heads; ++h) {
      const Vec weight = Vec::set1(weights[h * kChunkTokens + t]);
      for (int w = 0; w < Width; ++w) acc[h][w] = Vec::fma(weight, row[w], acc[h][w]);
    }
  }
  for (int h = 0; h < Heads; ++h) {
    for (int w = 0; w < Width; ++w) acc[h][w].store(out + h * head_dim + d + w * Vec::N);
  }
}

template <int Heads, class T>
void weigh_rows(const T* const* rows, int64_t count, const float* weights, int64_t head_dim, float* out,
                Ahead<T> ahead) {
  int64_t d = 0;
  for (; d + 4 * Vec::N <= head_dim; d += 4 * Vec::N)
    weigh_tile<Heads, 4>(rows, count, weights, d, head_dim, out, ahead);
  for (; d + 2 * Vec::N <= head_dim; d += 2 * Vec::N)
    weigh_tile<Heads, 2>(rows, count, weights, d, head_dim, out, ahead);
  for (; d < head_dim; d += Vec::N) weigh_tile<Heads, 1>(rows, count, weights, d, head_dim, out, ahead);
}

// Logits to weights relative to their maximum, in place; returns the maximum and the sum of the weights.
void softmax(float* logits, int64_t count, float softcap, float* max, float* sum) {
  // Pad to whole vectors with logits that weigh nothing.
  const int64_t padded = (count + Vec::N - 1) / Vec::N * Vec::N;
  for (int64_t t = count; t < padded; ++t) logits[t] = -INFINITY;
  if (softcap > 0) {
    const Vec cap = Vec::set1(softcap);
    for (int64_t t = 0; t < count; t += Vec::N) (cap * tanh(Vec::load(logits + t) / cap)).store(logits + t);
    for (int64_t t = count; t < padded; ++t) logits[t] = -INFINITY;
  }
  Vec high = Vec::set1(-INFINITY);
  for (int64_t t = 0; t < padded; t += Vec::N) high = Vec::max(high, Vec::load(logits + t));
  const float m = high.largest();
  // Where all are -inf, -inf - m would be NaN; combine_head drops such a chunk by its maximum.
  const Vec base = Vec::set1(m == -INFINITY ? 0 : m);
  Vec total = Vec::zero();
  for (int64_t t = 0; t < padded; t += Vec::N) {
    const Vec weight = exp(Vec::load(logits + t) - base);
    weight.store(logits + t);
    total = total + weight;
  }
  *max = m;
  *sum = total.sum();
}

// Every token of a chunk that takes part, by the addresses of its rows; tokens outside the window or past the end never
// get in.
template <class T>
struct ChunkRows {
  const T *k[kChunkTokens], *v[kChunkTokens];
  int64_t count;

  ChunkRows() {}  // the arrays stay as they are until gather

  void gather(const SparseDecodeParams& p, const AttendItem& item) {
    const int64_t page_size = p.cache.page_size, length = p.seq_lens[item.b];
    const int64_t start = p.window > 0 && p.window < length ? length - p.window : 0;
    const int32_t* list = p.selected ? p.pages + item.b * p.pages_stride_b + item.h * p.pages_stride_h : nullptr;
    count = 0;
    for (int64_t entry = item.first; entry < item.last; ++entry) {
      const int64_t page = list ? list[entry] : entry;
      if (page < 0) continue;
      const int64_t begin = page * page_size, stop = begin + page_size < length ? begin + page_size : length;
      const int64_t from = begin > start ? begin : start;
      if (from >= stop) continue;
      const int64_t physical = p.table.at(item.b, item.h, page);
      if (physical < 0) continue;  // not mapped
      const auto at = [&](const PagedBuffer& buffer) {
        return static_cast<const T*>(buffer.data) + physical * buffer.stride_page + item.h * buffer.stride_head;
      };
      const T *k_page = at(p.cache.k), *v_page = at(p.cache.v);
      for (int64_t slot = from - begin; slot < stop - begin; ++slot) {
        k[count] = k_page + slot * p.cache.k.stride_token;
        v[count++] = v_page + slot * p.cache.v.stride_token;
      }
    }
  }
};

// `next` is the chunk after this one: its keys are fetched while this one's values are summed, as these are while the
// logits are computed.
template <class T, class Q>
void attend_chunk(const SparseDecodeParams& p, const AttendItem& item, const ChunkRows<T>& rows,
                  const ChunkRows<T>& next, const Partials& partials) {
  const int64_t head_dim = p.cache.head_dim, count = rows.count;
  float queries[Vec::kHeadTile * kMaxHeadDim], weights[Vec::kHeadTile * kChunkTokens];
  for (int64_t g = 0; g < p.group; g += Vec::kHeadTile) {
    const int64_t heads = p.group - g < Vec::kHeadTile ? p.group - g : Vec::kHeadTile;
    float* acc = partials.acc + (item.partial + g) * head_dim;
    float *max = partials.max + item.partial + g, *sum = partials.sum + item.partial + g;
    for (int64_t i = 0; i < heads; ++i) {
      const Q* q = static_cast<const Q*>(p.q) + item.b * p.q_stride_b + (item.h * p.group + g + i) * p.q_stride_h;
      for (int64_t d = 0; d < head_dim; d += Vec::N) {
        (Vec::load(q + d) * Vec::set1(p.scale)).store(queries + i * head_dim + d);
      }
    }
    const Ahead<T> ahead{next.k, g == 0 ? next.count : 0};
    dots(rows.k, count, queries, heads, head_dim, weights, kChunkTokens, Ahead<T>{rows.v, g == 0 ? count : 0});
    for (int64_t i = 0; i < heads; ++i) softmax(weights + i * kChunkTokens, count, p.softcap, max + i, sum + i);
    switch (heads) {
      case 4:
        weigh_rows<4>(rows.v, rows.count, weights, head_dim, acc, ahead);
        break;
      case 3:
        weigh_rows<3>(rows.v, rows.count, weights, head_dim, acc, ahead);
        break;
      case 2:
        weigh_rows<2>(rows.v, rows.count, weights, head_dim, acc, ahead);
        break;
      default:
        weigh_rows<1>(rows.v, rows.count, weights, head_dim, acc, ahead);
    }
  }
}

template <class Q>
void combine_head(const SparseDecodeParams& p, const AttendItem* items, int64_t first, int64_t last,
                  const Partials& partials, int64_t g, int64_t row) {
  const int64_t head_dim = p.cache.head_dim;
  Q* out = static_cast<Q*>(p.out) + row * head_dim;
  float max = -INFINITY, sum = 0;
  for (int64_t i = first; i < last; ++i) {
    const float m = partials.max[items[i].partial + g];
    max = m > max ? m : max;
  }
  // Each chunk's factor replaces its maximum. A chunk that read nothing, or logits of -inf only, weighs nothing.
  for (int64_t i = first; i < last; ++i) {
    const int64_t at = items[i].partial + g;
    partials.max[at] = partials.max[at] == -INFINITY ? 0 : expf(partials.max[at] - max);
    sum += partials.sum[at] * partials.max[at];
  }
  p.lse[row] = max + logf(sum);  // only such chunks: -inf
  if (sum == 0) last = first;    // and out 0, also where a value is NaN
  const Vec scale = Vec::set1(sum == 0 ? 0 : 1 / sum);
  for (int64_t d = 0; d < head_dim; d += Vec::N) {
    Vec acc = Vec::zero();
    for (int64_t i = first; i < last; ++i) {
      const int64_t at = items[i].partial + g;
      acc = Vec::fma(Vec::set1(partials.max[at]), Vec::load(partials.acc + at * head_dim + d), acc);
    }
    (acc * scale).store(out + d);
  }
}

}  // namespace

void attend_chunks(const SparseDecodeParams& p, const AttendItem* items, const Partials& partials, int64_t begin,
                   int64_t end) {
  with_dtype(p.cache.dtype, [&]<class T>(const T*) {
    with_dtype(p.q_dtype, [&]<class Q>(const Q*) {
      ChunkRows<T> rows[2];
      rows[begin % 2].gather(p, items[begin]);
      for (int64_t i = begin; i < end; ++i) {
        ChunkRows<T>&now = rows[i % 2], &next = rows[(i + 1) % 2];
        next.count = 0;
        if (i + 1 < end) next.gather(p, items[i + 1]);
        attend_chunk<T, Q>(p, items[i], now, next, partials);
      }
    });
  });
}

void combine_chunks(const SparseDecodeParams& p, const AttendItem* items, const int64_t* first_item,
                    const Partials& partials, int64_t begin, int64_t end) {
  with_dtype(p.q_dtype, [&]<class Q>(const Q*) {
    for (int64_t i = begin; i < end; ++i) {
      for (int64_t g = 0; g < p.group; ++g) {
        combine_head<Q>(p, items, first_item[i], first_item[i + 1], partials, g, i * p.group + g);
      }
    }
  });
}

}  // namespace lil::cpu::LIL_ISA

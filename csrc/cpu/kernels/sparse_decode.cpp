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

// The slots [first, last) of a physical page that an entry of the list reads: none outside the window, past the end, or
// where the page is not mapped.
struct Slots {
  int64_t physical, first, last;
};

Slots slots_of(const SparseDecodeParams& p, const AttendItem& item, int64_t entry) {
  const int64_t page = p.selected ? p.pages[item.b * p.pages_stride_b + item.h * p.pages_stride_h + entry] : entry;
  if (page < 0) return {};
  const int64_t page_size = p.cache.page_size, length = p.seq_lens[item.b];
  const int64_t start = p.window > 0 && p.window < length ? length - p.window : 0;
  const int64_t begin = page * page_size, stop = begin + page_size < length ? begin + page_size : length;
  const int64_t from = begin > start ? begin : start;
  const int64_t physical = p.table.at(item.b, item.h, page);
  if (from >= stop || physical < 0) return {};
  return {physical, from - begin, stop - begin};
}

// Every token of a chunk that takes part, by the addresses of its rows, in the order of the list.
template <class T>
struct ChunkRows {
  const T *k[kChunkTokens], *v[kChunkTokens];
  float k_scale[kChunkTokens], v_scale[kChunkTokens];  // where the cache has such
  int64_t count;

  ChunkRows() {}  // the arrays stay as they are until gather

  void gather(const SparseDecodeParams& p, const AttendItem& item) {
    const PagedBuffer &keys = p.cache.k, &values = p.cache.v;
    const auto at = [&](const PagedBuffer& buffer, int64_t physical) {
      return static_cast<const T*>(buffer.data) + physical * buffer.stride_page + item.h * buffer.stride_head;
    };
    count = 0;
    for (int64_t entry = item.first; entry < item.last; ++entry) {
      const Slots slots = slots_of(p, item, entry);
      const T *k_page = at(keys, slots.physical), *v_page = at(values, slots.physical);
      const int64_t before = count;
      for (int64_t slot = slots.first; slot < slots.last; ++slot) {
        k[count] = k_page + slot * keys.stride_token;
        v[count++] = v_page + slot * values.stride_token;
      }
      fill(p.cache.k_scale, slots.physical, item.h, before, k_scale);
      fill(p.cache.v_scale, slots.physical, item.h, before, v_scale);
    }
  }

  // The factors of rows [first, count), which are of one page.
  void fill(const Scale& scale, int64_t physical, int64_t h, int64_t first, float* out) const {
    if (!scale.data) return;
    for (int64_t t = first; t < count; ++t) out[t] = scale.at(physical, h);
  }
};

void multiply(float* x, const float* factors, int64_t count) {
  for (int64_t i = 0; i < count; ++i) x[i] *= factors[i];
}

float sum_of(const float* x, int64_t count) {
  Vec vectors = Vec::zero();
  int64_t i = 0;
  for (; i + Vec::N <= count; i += Vec::N) vectors = vectors + Vec::load(x + i);
  float sum = vectors.sum();
  for (; i < count; ++i) sum += x[i];
  return sum;
}

// A chunk's weights, which are relative to its maximum, to the masses; share_masses does the rest. What is not read
// gets 0, which no weight is.
void put_masses(const SparseDecodeParams& p, const AttendItem& item, int64_t row, const float* weights) {
  const int64_t page_size = p.cache.page_size, first = row * p.entries_capacity();
  for (int64_t entry = item.first; entry < item.last; ++entry) {
    const Slots slots = slots_of(p, item, entry);
    const int64_t count = slots.last - slots.first;
    if (p.page_mass) p.page_mass[first + entry] = sum_of(weights, count);
    if (p.token_mass) {
      float* const tokens = p.token_mass + (first + entry) * page_size;
      memset(tokens, 0, page_size * sizeof(float));
      memcpy(tokens + slots.first, weights, count * sizeof(float));
    }
    weights += count;
  }
}

// `next` is the chunk after this one: its keys are fetched while this one's values are summed, as these are while the
// logits are computed.
template <class T>
void attend_chunk(const SparseDecodeParams& p, const AttendItem& item, const ChunkRows<T>& rows,
                  const ChunkRows<T>& next, const Partials& partials) {
  const int64_t head_dim = p.cache.head_dim, count = rows.count;
  float queries[Vec::kHeadTile * kMaxHeadDim], weights[Vec::kHeadTile * kChunkTokens];
  for (int64_t g = 0; g < p.group; g += Vec::kHeadTile) {
    const int64_t heads = p.group - g < Vec::kHeadTile ? p.group - g : Vec::kHeadTile;
    float* acc = partials.acc + (item.partial + g) * head_dim;
    float *max = partials.max + item.partial + g, *sum = partials.sum + item.partial + g;
    load_queries(p.q, p.q_dtype, item.b * p.q_stride_b + (item.h * p.group + g) * p.q_stride_h, p.q_stride_h, heads,
                 head_dim, p.scale, queries);
    const Ahead<T> ahead{next.k, g == 0 ? next.count : 0};
    dots(rows.k, count, queries, heads, head_dim, weights, kChunkTokens, Ahead<T>{rows.v, g == 0 ? count : 0});
    for (int64_t i = 0; i < heads; ++i) {
      float* const row = weights + i * kChunkTokens;
      if (p.cache.k_scale.data) multiply(row, rows.k_scale, count);
      softmax(row, count, p.softcap, max + i, sum + i);
      if (p.page_mass || p.token_mass) {
        put_masses(p, item, (item.b * p.cache.kv_heads + item.h) * p.group + g + i, row);
      }
      if (p.cache.v_scale.data) multiply(row, rows.v_scale, count);
    }
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

// Nothing read stays 0, also times NaN.
void share(float* masses, int64_t count, float factor) {
  for (int64_t i = 0; i < count; ++i) masses[i] *= masses[i] == 0 ? 1 : factor;
}

// One head's masses, `width` an entry, from those of its chunks; partials.max has the chunks' factors. Entries that are
// in no chunk get 0.
void share_masses(const SparseDecodeParams& p, const AttendItem* items, int64_t first, int64_t last,
                  const Partials& partials, int64_t g, float scale, float* masses, int64_t width) {
  for (int64_t i = first; i < last; ++i) {
    share(masses + items[i].first * width, (items[i].last - items[i].first) * width,
          partials.max[items[i].partial + g] * scale);
  }
  const int64_t end = first < last ? items[last - 1].last : 0;
  memset(masses + end * width, 0, (p.entries_capacity() - end) * width * sizeof(float));
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
  const float inverse = sum == 0 ? 0 : 1 / sum;
  const auto masses = [&](float* all, int64_t width) {
    if (all) {
      share_masses(p, items, first, last, partials, g, inverse, all + row * p.entries_capacity() * width, width);
    }
  };
  masses(p.page_mass, 1);
  masses(p.token_mass, p.cache.page_size);
  if (sum == 0) last = first;  // and out 0, also where a value is NaN
  const Vec scale = Vec::set1(inverse);
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
  with_stored_dtype(p.cache.dtype, [&]<class T>(const T*) {
    ChunkRows<T> rows[2];
    rows[begin % 2].gather(p, items[begin]);
    for (int64_t i = begin; i < end; ++i) {
      ChunkRows<T>&now = rows[i % 2], &next = rows[(i + 1) % 2];
      next.count = 0;
      if (i + 1 < end) next.gather(p, items[i + 1]);
      attend_chunk(p, items[i], now, next, partials);
    }
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

// score_pages: sixteen pages a warp at a time. A page's summary is one row of 2 * head_dim elements, and the heads of a
// group are the columns of a product with it: minmax is that of [min(q, 0), max(q, 0)] with [min, max], meanstd that of
// [q, q * q] with [mean, std * std]. Bytes bound it: the summaries, once.
#pragma once

#include <algorithm>

#include "cuda/append_kv.cuh"
#include "cuda/instances.h"
#include "cuda/mma.cuh"
#include "cuda/pages.cuh"

namespace lil::cuda {

constexpr int kScoreTile = 16;  // pages a warp scores at a time
constexpr int kScoreHeads = 8;  // query heads a product takes
constexpr int kScoreThreads = 256;

// Blocks of all heads of the same pages lie side by side in time, as their summaries do in memory.
struct ScoreGrid {
  int tiles_per_warp;
  dim3 blocks;

  // `append`: the first block of each head appends a token instead (sparse_decode_step).
  ScoreGrid(const ScorePagesParams& p, bool append, int tile = kScoreTile) {
    const int64_t block_pages = kScoreThreads / 32 * tile;
    const int64_t blocks_per_head = (p.pages.max_pages + block_pages - 1) / block_pages;
    // Enough blocks to fill the device several times over; beyond that a block takes more than one turn.
    const int64_t wanted = 8 * current_device().sms, all = blocks_per_head * p.kv_heads * p.batch;
    tiles_per_warp = static_cast<int>(std::clamp<int64_t>(all / wanted, 1, std::clamp<int64_t>(blocks_per_head, 1, 8)));
    blocks = dim3(p.kv_heads, (blocks_per_head + tiles_per_warp - 1) / tiles_per_warp + append, p.batch);
  }
};

// Appends one token of sequence b. A float8 summary S may be that of any cache.
template <class S>
__device__ inline void append_newest(const AppendKvParams& append, int32_t b, int32_t h, ErrorWord* errors) {
  Finding finding;
  const DType stored = kIsFloat8<S> ? append.cache.dtype : DType::kFloat8E4M3;
  if (stored == DType::kFloat8E4M3) {
    append_token<S, S>(append, b, b, h, b, b + 1, finding);
  } else if constexpr (kIsFloat8<S>) {
    if (stored == DType::kBFloat16) {
      append_token<__nv_bfloat16, S>(append, b, b, h, b, b + 1, finding);
    } else if (stored == DType::kFloat16) {
      append_token<__half, S>(append, b, b, h, b, b + 1, finding);
    } else {
      append_token<float, S>(append, b, b, h, b, b + 1, finding);
    }
  }
  finding.report(errors, Op::kAppendKv, b);
}

// Whether this block's part is to append. The page it changes is being scored by another block meanwhile; that score is
// never looked at, for the page of the newest token is always read.
template <class T>
__device__ bool appends(const AppendKvParams& append, int32_t b, int32_t h, ErrorWord* errors) {
  if (append.k == nullptr || blockIdx.y > 0) return false;
  if (threadIdx.x < 32) append_newest<T>(append, b, h, errors);
  return true;
}

// The first page of a warp's turn t.
__device__ inline int32_t first_page(const AppendKvParams& append, int32_t tiles_per_warp, int32_t t) {
  const int32_t block = blockIdx.y - (append.k != nullptr), warps = blockDim.x / 32, warp = threadIdx.x / 32;
  return ((block * tiles_per_warp + t) * warps + warp) * kScoreTile;
}

// What both kernels write: pages of the tile that exist get their score, the rest of it -inf.
struct ScoreTile {
  int32_t first, pages;  // first page, pages of the sequence
  float* scores;

  __device__ void store(int64_t max_pages, int32_t row, float score, bool mapped) const {
    if (first + row < max_pages) scores[first + row] = first + row < pages && mapped ? score : -INFINITY;
  }
};

// Where the page table's entry for a row of a tile is. It is asked for without knowing the sequence's length, and may
// be of no use.
__device__ inline const int32_t* table_entry(const ScorePagesParams& p, int32_t b, int32_t h, int32_t page) {
  return &p.pages.data[p.pages.index(b, h, min(page, static_cast<int32_t>(p.pages.max_pages) - 1))];
}

// A row of the tile: the page's summary and what it is multiplied by; null where the page is not there.
template <class T>
struct SummaryRow {
  const T* data;
  float scale;
};

template <class T>
__device__ SummaryRow<T> summary_row(const ScorePagesParams& p, const T* of_head, const ScoreTile& tile, int32_t h,
                                     int32_t row, int32_t entry, Finding& finding) {
  if (tile.first + row >= tile.pages) return {nullptr, 1};
  const int32_t physical = checked_entry(finding, entry, p.num_pages);
  if (physical < 0) return {nullptr, 1};
  return {of_head + physical * p.summary.stride_page, kIsFloat8<T> ? p.k_scale.at(physical, h) : 1};
}

// The head's summary of page 0.
template <class T>
__device__ const T* summaries_of(const ScorePagesParams& p, int32_t h) {
  return static_cast<const T*>(p.summary.data) + h * p.summary.stride_head;
}

// Squared standard deviations are made of std / kStdUnit, so that halves hold the largest: 448 of float8, 1023 of fp16.
template <class T>
constexpr float kStdUnit = std::is_same_v<T, __half> ? 4
                           : kIsFloat8<T>            ? 2
                                                     : 1;

// score = unit * (first + weight * second), of a mean's product and that of squares in units of kStdUnit.
template <class T>
__device__ inline float variance_weight(float unit) {
  return 0.5f * kStdUnit<T> * kStdUnit<T> * unit;
}

// The squares of packed deviations.
template <class T>
__device__ inline uint32_t square(uint32_t x) {
  if constexpr (std::is_same_v<Computed<T>, __half>) {
    __half2 pair;
    memcpy(&pair, &x, sizeof x);
    pair = __hmul2(pair, __float2half2_rn(1 / kStdUnit<T>));
    pair = __hmul2(pair, pair);
    memcpy(&x, &pair, sizeof x);
  } else {
    __nv_bfloat162 pair;
    memcpy(&pair, &x, sizeof x);
    pair = __hmul2(pair, pair);
    memcpy(&x, &pair, sizeof x);
  }
  return x;
}

// How a product's columns are staged. A row's halves, [0, D) and [D, 2 D), are chunks of 32 elements; where D is no
// multiple of 32 one chunk has elements of both, and is staged for each half with zeros for the other.
template <class T, int D>
struct ScoreQueries {
  using C = Computed<T>;
  static constexpr int kChunks = (D + 31) / 32, kSecond = D / 32;  // of a half; the second half's first chunk

  uint4* chunks;   // [head blocks][2][kChunks][32 lanes], as mma_chunk takes them
  float* factors;  // [head blocks * 8]: what the staged queries were divided by, so that their squares fit too
  bool divided;

  __device__ ScoreQueries(const ScorePagesParams& p, uint4* shared, int32_t blocks)
      : chunks(shared),
        factors(reinterpret_cast<float*>(shared + blocks * 2 * kChunks * 32)),
        divided(kIsFloat8<T> || p.summary.mode == SummaryMode::kMeanStd) {}
  static constexpr size_t bytes(int64_t blocks) {
    return blocks * (2 * kChunks * 32 * sizeof(uint4) + kScoreHeads * sizeof(float));
  }

  __device__ float factor(int32_t head) const { return divided ? factors[head] : 1; }

  // Eight elements of head g from d on.
  __device__ static uint4 load(const ScorePagesParams& p, int32_t b, int32_t h, int32_t g, int32_t d) {
    if (g >= p.group || d < 0 || d >= D) return {0, 0, 0, 0};
    const auto* const q = static_cast<const uint16_t*>(p.q) + b * p.q_stride_b + (h * p.group + g) * p.q_stride_h + d;
    return *reinterpret_cast<const uint4*>(q);
  }

  // By a whole warp, lane (n, c) with the g of n.
  __device__ static float make_factor(const ScorePagesParams& p, int32_t b, int32_t h, int32_t g) {
    uint32_t most = 0;  // a pair of magnitudes, which are in order as integers
#pragma unroll
    for (int j = 0; j < kChunks; ++j) {
      const uint4 x = load(p, b, h, g, j * 32 + threadIdx.x % 4 * 8);
      constexpr uint32_t kAbs = 0x7fff7fff;
      most = __vmaxu2(most, __vmaxu2(__vmaxu2(x.x & kAbs, x.y & kAbs), __vmaxu2(x.z & kAbs, x.w & kAbs)));
    }
    most = max(most & 0xffff, most >> 16);
    most = max(most, __shfl_xor_sync(~0u, most, 1));
    most = max(most, __shfl_xor_sync(~0u, most, 2));
    return query_factor(load_float(&most, p.q_dtype, 0));
  }

  // Eight elements of a head as a half's columns have them.
  __device__ uint4 make(const ScorePagesParams& p, uint4 x, int32_t half, float divisor) const {
    if constexpr (!kIsFloat8<T>) {
      if (!divided) return half == 0 ? min_vector<T>(x, {0, 0, 0, 0}) : max_vector<T>(x, {0, 0, 0, 0});
    }
    const float inverse = 1 / divisor;
    uint32_t words[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      float pair[2];
#pragma unroll
      for (int k = 0; k < 2; ++k) {
        const float value = load_float(&x, p.q_dtype, 2 * i + k) * inverse;
        if (p.summary.mode == SummaryMode::kMeanStd) {
          pair[k] = half == 0 ? value : value * value;
        } else {
          pair[k] = half == 0 ? min_nan(value, 0) : max_nan(value, 0);
        }
      }
      words[i] = pack<C>(pair[0], pair[1]);
    }
    return {words[0], words[1], words[2], words[3]};
  }

  __device__ void stage(const ScorePagesParams& p, int32_t b, int32_t h, int32_t blocks) {
#pragma unroll 1
    for (int32_t i = threadIdx.x; i < blocks * 2 * kChunks * 32; i += blockDim.x) {
      const int32_t block = i / (2 * kChunks * 32), half = i / (kChunks * 32) % 2, j = i / 32 % kChunks;
      const int32_t g = block * kScoreHeads + i % 32 / 4, d = (half * kSecond + j) * 32 + i % 4 * 8 - half * D;
      const uint4 x = load(p, b, h, g, d);
      const float divisor = divided ? make_factor(p, b, h, g) : 1;
      if (divided && half == 0 && j == 0 && i % 4 == 0) factors[g] = divisor;
      chunks[i] = make(p, x, half, divisor);
    }
  }
};

template <class T, int D>
__global__ void __launch_bounds__(kScoreThreads, D > 192 ? 1 : 2)
    score_pages_mma(const __grid_constant__ ScorePagesParams p, const __grid_constant__ AppendKvParams append,
                    int tiles_per_warp, ErrorWord* errors) {
  using Queries = ScoreQueries<T, D>;
  using C = Computed<T>;
  using Eight = typename Stored<T>::Eight;
  // More than eight chunks would not fit in the registers together with as many in flight: a half at a time then.
  constexpr int kRowChunks = 2 * D / 32, kLoaded = kRowChunks <= 8 ? kRowChunks : Queries::kChunks;
  constexpr bool kWhole = kLoaded == kRowChunks;
  extern __shared__ uint4 shared[];
  const int32_t h = blockIdx.x, b = blockIdx.z, lane = threadIdx.x % 32, n = lane / 4, c = lane % 4;
  const int32_t group = static_cast<int32_t>(p.group), blocks = ceil_div(group, kScoreHeads);
  const bool mean_std = p.summary.mode == SummaryMode::kMeanStd;
  // Nothing may be read yet, but where it is can be known. (A block that appends has no pages, and reads none of this.)
  const int32_t first = first_page(append, tiles_per_warp, 0);
  const int32_t *first_entry = table_entry(p, b, h, first + n), *second_entry = table_entry(p, b, h, first + n + 8);
  const int32_t* seq_len = p.seq_lens + b;
  const T* summaries = summaries_of<T>(p, h);
  keep(first_entry), keep(second_entry), keep(seq_len), keep(summaries);
  wait_for_previous();
  let_next_start();
  if (appends<T>(append, b, h, errors)) return;
  Queries queries(p, shared, blocks);
  const int32_t max_pages = static_cast<int32_t>(p.pages.max_pages);
  const PageSize page_size(p.page_size);
  Finding finding;
  int32_t entries[2] = {*first_entry, *second_entry};
  const int32_t length = checked_length(finding, seq_len, 0, p.pages.max_pages << page_size.shift);

  ScoreTile tile{first, page_size.pages(length), p.scores + (b * p.kv_heads + h) * p.pages.max_pages};
#pragma unroll 1
  for (int32_t t = 0; t < tiles_per_warp; ++t) {
    if (t > 0) {
      tile.first = first_page(append, tiles_per_warp, t);
      if (tile.first >= max_pages) break;
      entries[0] = *table_entry(p, b, h, tile.first + n), entries[1] = *table_entry(p, b, h, tile.first + n + 8);
    }
    const SummaryRow<T> rows[2] = {summary_row(p, summaries, tile, h, n, entries[0], finding),
                                   summary_row(p, summaries, tile, h, n + 8, entries[1], finding)};
    float best[2] = {-INFINITY, -INFINITY};
#pragma unroll 1
    for (int32_t block = 0; block < blocks; ++block) {
      float acc[4] = {};
      const auto unit = [&](int i) {
        return rows[i / 2].scale * p.scale * queries.factor(block * kScoreHeads + 2 * c + i % 2);
      };
      Eight row[2][kLoaded];
#pragma unroll(kWhole ? 2 : 1)
      for (int half = 1; half >= 0; --half) {  // the second first: meanstd weighs it before it adds the means
        const int first = half * Queries::kSecond, first_loaded = kWhole ? 0 : first;
        if (half == 1 || !kWhole) {
#pragma unroll
          for (int j = 0; j < kLoaded; ++j) {
#pragma unroll
            for (int r = 0; r < 2; ++r) {
              const T* const data = rows[r].data + (first_loaded + j) * 32 + c * 8;
              row[r][j] = rows[r].data ? load_once(reinterpret_cast<const Eight*>(data)) : Eight{};
            }
          }
        }
        // The first rows are on their way while the queries are staged, by all warps.
        if (t == 0 && block == 0 && half == 1) {
          queries.stage(p, b, h, blocks);
          __syncthreads();
        }
        const uint4* const query = queries.chunks + (block * 2 + half) * Queries::kChunks * 32 + lane;
#pragma unroll
        for (int j = 0; j < Queries::kChunks; ++j) {
          uint4 wide[2];
#pragma unroll
          for (int r = 0; r < 2; ++r) {
            wide[r] = widen8<T>(row[r][first + j - first_loaded]);
            if (mean_std) {
              // Of a chunk with elements of both halves only this half's may be looked at: NaN times 0 is NaN.
              const int32_t d = (first + j) * 32 + c * 8;
              if (D % 32 != 0 && (half == 0 ? d >= D : d < D)) wide[r] = {0, 0, 0, 0};
              if (half == 1) {
                wide[r] = {square<T>(wide[r].x), square<T>(wide[r].y), square<T>(wide[r].z), square<T>(wide[r].w)};
              }
            }
          }
          mma_chunk<C>(acc, wide[0], wide[1], query[j * 32]);
        }
        if (half == 1 && mean_std) {
#pragma unroll
          for (int i = 0; i < 4; ++i) acc[i] *= variance_weight<T>(unit(i));
        }
      }
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const bool is_head = block * kScoreHeads + 2 * c + i % 2 < group;
        if (is_head) best[i / 2] = max_nan(best[i / 2], acc[i] * unit(i));
      }
    }
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      best[r] = max_nan(best[r], __shfl_xor_sync(~0u, best[r], 1));
      best[r] = max_nan(best[r], __shfl_xor_sync(~0u, best[r], 2));
      if (c == 0) tile.store(max_pages, n + 8 * r, best[r], rows[r].data != nullptr);
    }
  }
  finding.report(errors, Op::kScorePages, b);
}

// Any dtypes, in fp32: four lanes share a page. Heads go in blocks, so that shared memory holds any group.
template <class T>
__global__ void __launch_bounds__(kScoreThreads, 2)
    score_pages_fma(const __grid_constant__ ScorePagesParams p, const __grid_constant__ AppendKvParams append,
                    int tiles_per_warp, ErrorWord* errors) {
  extern __shared__ float values[];  // [kScoreHeads][2 * head_dim]
  const int32_t h = blockIdx.x, b = blockIdx.z, n = threadIdx.x % 32 / 4, c = threadIdx.x % 4;
  const int32_t group = static_cast<int32_t>(p.group);
  const int32_t head_dim = static_cast<int32_t>(p.head_dim), width = 2 * head_dim;
  const bool mean_std = p.summary.mode == SummaryMode::kMeanStd;
  wait_for_previous();
  let_next_start();
  if (appends<T>(append, b, h, errors)) return;
  const int32_t max_pages = static_cast<int32_t>(p.pages.max_pages);
  const PageSize page_size(p.page_size);
  Finding finding;
  const int32_t length = checked_length(finding, p.seq_lens, b, p.pages.max_pages << page_size.shift);
  ScoreTile tile{0, page_size.pages(length), p.scores + (b * p.kv_heads + h) * p.pages.max_pages};

  for (int32_t first_head = 0; first_head < group; first_head += kScoreHeads) {
    const int32_t heads = min(group - first_head, kScoreHeads);
    __syncthreads();
#pragma unroll 1
    for (int32_t i = threadIdx.x; i < heads * width; i += blockDim.x) {
      const int32_t g = first_head + i / width, d = i % width;
      const int64_t at = b * p.q_stride_b + (h * p.group + g) * p.q_stride_h + (d < head_dim ? d : d - head_dim);
      const float x = load_float(p.q, p.q_dtype, at);
      if (mean_std) {
        values[i] = d < head_dim ? x : x * x;
      } else {
        values[i] = d < head_dim ? min_nan(x, 0) : max_nan(x, 0);
      }
    }
    __syncthreads();
#pragma unroll 1
    for (int32_t t = 0; t < tiles_per_warp; ++t) {
      tile.first = first_page(append, tiles_per_warp, t);
      if (tile.first >= max_pages) break;
#pragma unroll 1
      for (int32_t r = n; r < kScoreTile; r += 8) {
        const SummaryRow<T> row =
            summary_row(p, summaries_of<T>(p, h), tile, h, r, *table_entry(p, b, h, tile.first + r), finding);
        const float unit = row.scale * p.scale;
        float best = first_head == 0 || c != 0 || row.data == nullptr ? -INFINITY : tile.scores[tile.first + r];
#pragma unroll 1
        for (int32_t g = 0; g < heads; ++g) {
          float sums[2];  // of the halves
#pragma unroll
          for (int half = 0; half < 2; ++half) {
            sums[half] = 0;
#pragma unroll 2
            for (int32_t d = half * head_dim + 4 * c; row.data && d < (half + 1) * head_dim; d += 16) {
#pragma unroll
              for (int32_t i = d; i < d + 4; ++i) {
                float x = to_float(row.data[i]);
                if (half == 1 && mean_std) x *= x;
                sums[half] = fmaf(values[g * width + i], x, sums[half]);
              }
            }
            sums[half] += __shfl_xor_sync(~0u, sums[half], 1);
            sums[half] += __shfl_xor_sync(~0u, sums[half], 2);
          }
          best = max_nan(best, unit * (sums[0] + (mean_std ? 0.5f * unit * sums[1] : sums[1])));
        }
        if (c == 0) tile.store(max_pages, r, best, row.data != nullptr);
      }
    }
  }
  finding.report(errors, Op::kScorePages, b);
}

}  // namespace lil::cuda

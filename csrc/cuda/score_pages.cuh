// score_pages: sixteen pages a warp at a time. minmax is one product of [min(q, 0), max(q, 0)] with the page's
// [min, max], so a page's summary is one row of 2 * head_dim, and the heads of a group are the product's columns.
// Bytes bound it: the summaries, once.
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
  ScoreGrid(const ScorePagesParams& p, bool append) {
    constexpr int64_t kBlockPages = kScoreThreads / 32 * kScoreTile;
    const int64_t blocks_per_head = (p.pages.max_pages + kBlockPages - 1) / kBlockPages;
    // Enough blocks to fill the device several times over; beyond that a block takes more than one turn.
    const int64_t wanted = 8 * current_device().sms, all = blocks_per_head * p.kv_heads * p.batch;
    tiles_per_warp = static_cast<int>(std::clamp<int64_t>(all / wanted, 1, std::clamp<int64_t>(blocks_per_head, 1, 8)));
    blocks = dim3(p.kv_heads, (blocks_per_head + tiles_per_warp - 1) / tiles_per_warp + append, p.batch);
  }
};

// Whether this block's part is to append one token of sequence b. The page it changes is being scored by another block
// meanwhile; that score is never looked at, for the page of the newest token is always read.
template <class T>
__device__ bool appends(const AppendKvParams& append, int32_t b, int32_t h, ErrorWord* errors) {
  if (append.k == nullptr || blockIdx.y > 0) return false;
  if (threadIdx.x < 32) {
    Finding finding;
    append_token<T>(append, b, b, h, b, b + 1, finding);
    finding.report(errors, Op::kAppendKv, b);
  }
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

// Row n of the tile: the page's summary, or null where the page is not there.
template <class T>
__device__ const T* summary_row(const ScorePagesParams& p, const ScoreTile& tile, int32_t b, int32_t h, int32_t row,
                                Finding& finding) {
  const int32_t page = tile.first + row;
  if (page >= tile.pages) return nullptr;
  const int64_t physical = checked_page(finding, p.pages, b, h, page, p.num_pages);
  if (physical < 0) return nullptr;
  return static_cast<const T*>(p.summary.data) + physical * p.summary.stride_page + h * p.summary.stride_head;
}

// [min(q, 0), max(q, 0)] of a head, elements d to d + 7 of its 2 * head_dim, unscaled.
template <class T, int D>
__device__ uint4 split_query(const ScorePagesParams& p, int32_t b, int32_t h, int32_t g, int32_t d) {
  if (g >= p.group) return {0, 0, 0, 0};
  const T* const q = static_cast<const T*>(p.q) + b * p.q_stride_b + (h * p.group + g) * p.q_stride_h;
  const uint4 x = *reinterpret_cast<const uint4*>(q + (d < D ? d : d - D));
  return d < D ? min_vector<T>(x, {0, 0, 0, 0}) : max_vector<T>(x, {0, 0, 0, 0});
}

template <class T, int D>
__global__ void __launch_bounds__(kScoreThreads, D > 192 ? 1 : 2)
    score_pages_mma(const __grid_constant__ ScorePagesParams p, const __grid_constant__ AppendKvParams append,
                    int tiles_per_warp, ErrorWord* errors) {
  constexpr int kChunks = 2 * D / 32, kHalf = kChunks <= 8 ? kChunks : kChunks / 2;
  extern __shared__ uint4 queries[];  // [head blocks][kChunks][32 lanes], as mma_chunk takes them
  const int32_t h = blockIdx.x, b = blockIdx.z, lane = threadIdx.x % 32, n = lane / 4, c = lane % 4;
  const int32_t group = static_cast<int32_t>(p.group), blocks = ceil_div(group, kScoreHeads);
  wait_for_previous();
  let_next_start();
  if (appends<T>(append, b, h, errors)) return;
#pragma unroll 1
  for (int32_t i = threadIdx.x; i < blocks * kChunks * 32; i += blockDim.x) {
    const int32_t g = i / (kChunks * 32) * kScoreHeads + i % 32 / 4;
    queries[i] = split_query<T, D>(p, b, h, g, i / 32 % kChunks * 32 + i % 4 * 8);
  }
  const int32_t max_pages = static_cast<int32_t>(p.pages.max_pages);
  const PageSize page_size(p.page_size);
  Finding finding;
  const int32_t length = checked_length(finding, p.seq_lens, b, p.pages.max_pages << page_size.shift);
  __syncthreads();

  ScoreTile tile{0, page_size.pages(length), p.scores + (b * p.kv_heads + h) * p.pages.max_pages};
#pragma unroll 1
  for (int32_t t = 0; t < tiles_per_warp; ++t) {
    tile.first = first_page(append, tiles_per_warp, t);
    if (tile.first >= max_pages) break;
    const T* const rows[2] = {summary_row<T>(p, tile, b, h, n, finding), summary_row<T>(p, tile, b, h, n + 8, finding)};
    float best[2] = {-INFINITY, -INFINITY};
    // More than eight chunks would not fit in the registers together with as many in flight: two halves then.
#pragma unroll 1
    for (int32_t block = 0; block < blocks; ++block) {
      float acc[4] = {};
#pragma unroll
      for (int half = 0; half < kChunks; half += kHalf) {
        uint4 row[2][kHalf];
#pragma unroll
        for (int j = 0; j < kHalf; ++j) {
#pragma unroll
          for (int r = 0; r < 2; ++r) {
            row[r][j] = rows[r] ? load_once(reinterpret_cast<const uint4*>(rows[r] + (half + j) * 32 + c * 8))
                                : uint4{0, 0, 0, 0};
          }
        }
        const uint4* const query = queries + (block * kChunks + half) * 32 + lane;
#pragma unroll
        for (int j = 0; j < kHalf; ++j) mma_chunk<T>(acc, row[0][j], row[1][j], query[j * 32]);
      }
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const bool is_head = block * kScoreHeads + 2 * c + i % 2 < group;
        if (is_head) best[i / 2] = max_nan(best[i / 2], acc[i]);
      }
    }
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      best[r] = max_nan(best[r], __shfl_xor_sync(~0u, best[r], 1));
      best[r] = max_nan(best[r], __shfl_xor_sync(~0u, best[r], 2));
      if (c == 0) tile.store(max_pages, n + 8 * r, best[r] * p.scale, rows[r] != nullptr);
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
      values[i] = d < head_dim ? min_nan(x, 0) : max_nan(x, 0);
    }
    __syncthreads();
#pragma unroll 1
    for (int32_t t = 0; t < tiles_per_warp; ++t) {
      tile.first = first_page(append, tiles_per_warp, t);
      if (tile.first >= max_pages) break;
#pragma unroll 1
      for (int32_t r = n; r < kScoreTile; r += 8) {
        const T* const row = summary_row<T>(p, tile, b, h, r, finding);
        float best = first_head == 0 || c != 0 || row == nullptr ? -INFINITY : tile.scores[tile.first + r];
#pragma unroll 1
        for (int32_t g = 0; g < heads; ++g) {
          float sum = 0;
#pragma unroll 2
          for (int32_t d = 4 * c; row && d < width; d += 16) {
#pragma unroll
            for (int32_t i = d; i < d + 4; ++i) sum = fmaf(values[g * width + i], to_float(row[i]), sum);
          }
          sum += __shfl_xor_sync(~0u, sum, 1);
          sum += __shfl_xor_sync(~0u, sum, 2);
          best = max_nan(best, sum * p.scale);
        }
        if (c == 0) tile.store(max_pages, r, best, row != nullptr);
      }
    }
  }
  finding.report(errors, Op::kScorePages, b);
}

}  // namespace lil::cuda

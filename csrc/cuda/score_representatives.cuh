// score_pages of representative keys. The mean of q . k over a group's heads and a page's r keys is one dot product of
// the page's row, r * head_dim elements, with the heads' mean query, r times over. Two operations an element: bytes
// bound it, so a row is read once, 128 bytes at a time by eight lanes, and is multiplied in fp32 whatever is stored.
#pragma once

#include "cuda/score_pages.cuh"

namespace lil::cuda {

constexpr int kRowLanes = 8;                         // lanes that share a page
constexpr int kRepresentativeTile = 32 / kRowLanes;  // pages a warp scores at a time
constexpr int kRowAhead = 4;                         // loads of a lane in flight

// The mean query, times scale, in shared memory. Lanes take vectors of a row, side by side: so the fours of a vector
// lie apart, [fours of a vector][vectors of a row], and lanes read side by side here too.
template <class T>
struct MeanQuery {
  static constexpr int kElements = 16 / sizeof(T), kFours = kElements / 4;

  float4* fours;
  int32_t vectors;  // of a row

  __device__ void stage(const ScorePagesParams& p, int32_t b, int32_t h) const {
    const int32_t group = static_cast<int32_t>(p.group), head_dim = static_cast<int32_t>(p.head_dim);
    const int64_t first = b * p.q_stride_b + h * p.group * p.q_stride_h;
    const float unit = p.scale / static_cast<float>(p.group * p.summary.vectors);
    for (int32_t d = threadIdx.x; d < head_dim; d += blockDim.x) {
      float sum = 0;
#pragma unroll 4
      for (int32_t g = 0; g < group; ++g) sum += load_float(p.q, p.q_dtype, first + g * p.q_stride_h + d);
      for (int32_t i = d; i < vectors * kElements; i += head_dim) {
        const int32_t four = i % kElements / 4 * vectors + i / kElements;
        reinterpret_cast<float*>(fours)[four * 4 + i % 4] = sum * unit;
      }
    }
  }

  // sums += the products with vector v of a row.
  __device__ void multiply(const uint4& vector, int32_t v, float4& sums) const {
    const T* const x = reinterpret_cast<const T*>(&vector);
#pragma unroll
    for (int i = 0; i < kFours; ++i) {
      const float4 q = fours[i * vectors + v];
      sums.x = fmaf(q.x, to_float(x[4 * i]), sums.x);
      sums.y = fmaf(q.y, to_float(x[4 * i + 1]), sums.y);
      sums.z = fmaf(q.z, to_float(x[4 * i + 2]), sums.z);
      sums.w = fmaf(q.w, to_float(x[4 * i + 3]), sums.w);
    }
  }
};

template <class T>
__global__ void __launch_bounds__(kScoreThreads, 4)
    score_pages_representative(const __grid_constant__ ScorePagesParams p, int tiles_per_warp, ErrorWord* errors) {
  extern __shared__ float4 staged[];
  const int32_t h = blockIdx.x, b = blockIdx.z, n = threadIdx.x % 32 / kRowLanes, c = threadIdx.x % kRowLanes;
  const int32_t max_pages = static_cast<int32_t>(p.pages.max_pages), warps = blockDim.x / 32, warp = threadIdx.x / 32;
  const PageSize page_size(p.page_size);
  Finding finding;
  wait_for_previous();
  let_next_start();
  const int32_t length = checked_length(finding, p.seq_lens, b, p.pages.max_pages << page_size.shift);
  const MeanQuery<T> query{staged, static_cast<int32_t>(p.summary.vectors * p.head_dim) / MeanQuery<T>::kElements};
  query.stage(p, b, h);
  __syncthreads();

  ScoreTile tile{0, page_size.pages(length), p.scores + (b * p.kv_heads + h) * p.pages.max_pages};
#pragma unroll 1
  for (int32_t t = 0; t < tiles_per_warp; ++t) {
    tile.first = ((blockIdx.y * tiles_per_warp + t) * warps + warp) * kRepresentativeTile;
    if (tile.first >= max_pages) break;
    const SummaryRow<T> row =
        summary_row(p, summaries_of<T>(p, h), tile, h, n, *table_entry(p, b, h, tile.first + n), finding);
    const auto* const vectors = reinterpret_cast<const uint4*>(row.data);
    float4 sums = {0, 0, 0, 0};
#pragma unroll 1
    for (int32_t v = c; row.data != nullptr && v < query.vectors; v += kRowLanes * kRowAhead) {
      uint4 loaded[kRowAhead];
#pragma unroll
      for (int i = 0; i < kRowAhead; ++i) {
        if (v + kRowLanes * i < query.vectors) loaded[i] = load_once(vectors + v + kRowLanes * i);
      }
#pragma unroll
      for (int i = 0; i < kRowAhead; ++i) {
        if (v + kRowLanes * i < query.vectors) query.multiply(loaded[i], v + kRowLanes * i, sums);
      }
    }
    float sum = sums.x + sums.y + (sums.z + sums.w);
#pragma unroll
    for (int lanes = 1; lanes < kRowLanes; lanes *= 2) sum += __shfl_xor_sync(~0u, sum, lanes);
    if (c == 0) tile.store(max_pages, n, sum * row.scale, row.data != nullptr);
  }
  finding.report(errors, Op::kScorePages, b);
}

}  // namespace lil::cuda

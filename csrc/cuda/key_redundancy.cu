// key_redundancy: a block takes kTile rows of the matrix of cosines of one (sequence, KV head) and goes over its
// columns in tiles of as many, by plain multiply-adds in fp32. A second kernel takes from each column what the rows
// drop there, in the order of the rows, so that sums have the same bits in every run.
#include "cuda/backend.h"
#include "cuda/launch.cuh"
#include "cuda/numbers.cuh"
#include "cuda/pages.cuh"
#include "key_redundancy.h"

namespace lil::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kTile = 64;   // rows, and columns, of a tile
constexpr int kChunk = 16;  // elements of the keys in shared memory at a time; divides every head_dim
constexpr int kEach = 4;    // a thread has kEach x kEach entries of the tile, and loads as many elements of a key
constexpr int kSide = kTile / kEach;
static_assert(kSide * kSide == kThreads && kTile * kChunk == kThreads * kEach);

// The entry that a row leaves out.
struct Dropped {
  int32_t slot;
  float cosine;
};

// A chunk of a tile's keys, the elements of one place side by side. The padding keeps float4 aligned.
using Chunk = float[kChunk][kTile + 4];

// kEach elements, widened.
template <class T>
__device__ float4 load_four(const T* key) {
  using Bits = std::conditional_t<sizeof(T) == 4, uint4, std::conditional_t<sizeof(T) == 2, uint2, uint32_t>>;
  const Bits bits = *reinterpret_cast<const Bits*>(key);
  const T* const x = reinterpret_cast<const T*>(&bits);
  return {to_float(x[0]), to_float(x[1]), to_float(x[2]), to_float(x[3])};
}

// The key that this thread loads a part of, or null: past the end, or on a page that is not there, it is zeros.
template <class T>
__device__ const T* key_of(const KeyRedundancyParams& p, int32_t b, int32_t h, int32_t slot, int32_t length,
                           PageSize page_size, Finding& finding) {
  if (slot >= length) return nullptr;
  const int64_t physical = checked_page(finding, p.table, b, h, page_size.page(slot), p.cache.num_pages);
  finding.note(physical < 0, Wrong::kPageTable, -1, p.cache.num_pages - 1);  // here it must be mapped
  if (physical < 0) return nullptr;
  const PagedBuffer& k = p.cache.k;
  return static_cast<const T*>(k.data) + physical * k.stride_page + h * k.stride_head +
         page_size.slot(slot) * k.stride_token;
}

__device__ void stage(Chunk& chunk, float4 x) {
  const int row = threadIdx.x / (kChunk / kEach), first = threadIdx.x % (kChunk / kEach) * kEach;
  chunk[first][row] = x.x, chunk[first + 1][row] = x.y, chunk[first + 2][row] = x.z, chunk[first + 3][row] = x.w;
}

__device__ int32_t checked_tokens(const KeyRedundancyParams& p, int32_t b, Finding& finding) {
  const int32_t length = checked_length(finding, p.seq_lens, b, p.slots);
  const bool bad = length > p.positions_capacity;
  finding.note(bad, Wrong::kPositionsShort, static_cast<int32_t>(p.positions_capacity), length);
  return bad ? 0 : length;
}

template <class T>
__global__ void __launch_bounds__(kThreads)
    redundancy_rows(const __grid_constant__ KeyRedundancyParams p, Dropped* dropped, ErrorWord* errors) {
  __shared__ __align__(16) Chunk row_chunk, column_chunk;
  const int32_t h = blockIdx.y, b = blockIdx.z, first_row = blockIdx.x * kTile;
  wait_for_previous();
  let_next_start();
  Finding finding;
  const PageSize page_size(p.cache.page_size);
  const int32_t length = checked_tokens(p, b, finding), head_dim = static_cast<int32_t>(p.cache.head_dim);
  const int32_t own = threadIdx.x / (kChunk / kEach), part = threadIdx.x % (kChunk / kEach) * kEach;
  const int32_t y = threadIdx.x / kSide * kEach, x = threadIdx.x % kSide * kEach;
  const T* const row = key_of<T>(p, b, h, first_row + own, length, page_size, finding);

  float sum[kEach] = {};
  int32_t rank[kEach];
  Dropped drop[kEach] = {};
#pragma unroll
  for (int i = 0; i < kEach; ++i) rank[i] = INT32_MIN;
  const int32_t end = first_row < length ? length : 0;
#pragma unroll 1
  for (int32_t start = 0; start < end; start += kTile) {
    const T* const column = key_of<T>(p, b, h, start + own, length, page_size, finding);
    float dot[kEach][kEach] = {}, row_squares[kEach] = {}, column_squares[kEach] = {};
#pragma unroll 1
    for (int32_t d = 0; d < head_dim; d += kChunk) {
      __syncthreads();
      stage(row_chunk, row ? load_four(row + d + part) : float4{});
      stage(column_chunk, column ? load_four(column + d + part) : float4{});
      __syncthreads();
#pragma unroll
      for (int e = 0; e < kChunk; ++e) {
        const float4 row_part = *reinterpret_cast<const float4*>(&row_chunk[e][y]);
        const float4 column_part = *reinterpret_cast<const float4*>(&column_chunk[e][x]);
        const float rows[kEach] = {row_part.x, row_part.y, row_part.z, row_part.w};
        const float columns[kEach] = {column_part.x, column_part.y, column_part.z, column_part.w};
#pragma unroll
        for (int i = 0; i < kEach; ++i) {
          row_squares[i] = fmaf(rows[i], rows[i], row_squares[i]);
          column_squares[i] = fmaf(columns[i], columns[i], column_squares[i]);
#pragma unroll
          for (int j = 0; j < kEach; ++j) dot[i][j] = fmaf(rows[i], columns[j], dot[i][j]);
        }
      }
    }
#pragma unroll
    for (int j = 0; j < kEach; ++j) {
      const int32_t slot = start + x + j;
      if (slot >= length) break;
      const int32_t position = p.position(b, h, slot);
      finding.note(position < 0, Wrong::kPositions, position, 0);
      const float norm = sqrtf(column_squares[j]) + kNormFloor;
#pragma unroll
      for (int i = 0; i < kEach; ++i) {
        const bool self = slot == first_row + y + i;
        const float cosine = self ? 0 : dot[i][j] / ((sqrtf(row_squares[i]) + kNormFloor) * norm);
        const int32_t here = redundancy_rank(cosine, p.threshold, position);
        sum[i] += cosine;
        if (here >= rank[i]) rank[i] = here, drop[i] = {slot, cosine};
      }
    }
  }
  finding.report(errors, Op::kKeyRedundancy, b);

  // The kSide threads of a row are neighbours in a warp.
#pragma unroll
  for (int i = 0; i < kEach; ++i) {
#pragma unroll
    for (int step = 1; step < kSide; step *= 2) {
      sum[i] += __shfl_xor_sync(~0u, sum[i], step);
      const int32_t other = __shfl_xor_sync(~0u, rank[i], step);
      const Dropped theirs{__shfl_xor_sync(~0u, drop[i].slot, step), __shfl_xor_sync(~0u, drop[i].cosine, step)};
      if (other > rank[i] || (other == rank[i] && theirs.slot > drop[i].slot)) rank[i] = other, drop[i] = theirs;
    }
    const int32_t slot = first_row + y + i;
    if (x != 0 || slot >= length) continue;
    const int64_t at = (b * p.cache.kv_heads + h) * p.slots + slot;
    p.redundancy[at] = sum[i];
    dropped[at] = drop[i];
  }
}

// A thread a column: from its sum, which is that of its row, to the mean of what is left.
__global__ void __launch_bounds__(kThreads)
    settle(const __grid_constant__ KeyRedundancyParams p, const Dropped* dropped) {
  __shared__ Dropped some[kThreads];
  const int32_t h = blockIdx.y, b = blockIdx.z, slot = blockIdx.x * kThreads + threadIdx.x;
  wait_for_previous();
  let_next_start();
  Finding reported;  // by the rows
  const int32_t length = checked_tokens(p, b, reported);
  const int64_t head = (b * p.cache.kv_heads + h) * p.slots;
  float value = slot < length ? p.redundancy[head + slot] : 0;
#pragma unroll 1
  for (int32_t first = 0; first < length; first += kThreads) {
    const int32_t here = min(kThreads, length - first);
    __syncthreads();
    if (threadIdx.x < here) some[threadIdx.x] = dropped[head + first + threadIdx.x];
    __syncthreads();
#pragma unroll 8
    for (int32_t i = 0; i < here; ++i) value -= some[i].slot == slot ? some[i].cosine : 0;
  }
  if (slot < p.slots) p.redundancy[head + slot] = slot < length ? value / length : 0;
}

}  // namespace

void key_redundancy(const KeyRedundancyParams& p, const Tensor& on) {
  const Launch launch(on);
  const int64_t heads = p.batch * p.cache.kv_heads;
  Tensor scratch = torch::stable::new_empty(on, {heads * p.slots, 2}, ScalarType::Int);
  Dropped* const dropped = static_cast<Dropped*>(scratch.mutable_data_ptr());
  const auto grid = [&](int tile) { return dim3((p.slots + tile - 1) / tile, p.cache.kv_heads, p.batch); };
  with_dtype(p.cache.dtype, [&]<class T>(const T*) {
    launch(redundancy_rows<T>, grid(kTile), kThreads, 0, 1, p, dropped, error_word());
  });
  launch(settle, grid(kThreads), kThreads, 0, 1, p, static_cast<const Dropped*>(dropped));
}

}  // namespace lil::cuda

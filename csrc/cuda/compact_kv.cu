// compact_kv: one block moves the keys, or the values, of one (sequence, KV head).
#include "cuda/backend.h"
#include "cuda/launch.cuh"
#include "cuda/pages.cuh"

namespace lil::cuda {
namespace {

constexpr int kThreads = 512;
constexpr int kVectors = 4;  // 16-byte vectors that a thread holds
constexpr int kTile = kThreads * kVectors;

// Checks a head's slots, each thread its share. What one block finds the other of the head finds too.
__device__ bool all_right(const CompactKvParams& p, int32_t b, int32_t h, const int32_t* keep, PageSize page_size,
                          Finding& finding) {
  const int32_t count = p.counts[b], slots = page_size.first(static_cast<int32_t>(p.table.max_pages));
  finding.note(count < 0 || count > p.capacity, Wrong::kKeepCounts, count, p.capacity);
#pragma unroll 1
  for (int32_t i = threadIdx.x; i < count && finding.wrong == Wrong::kNothing; i += kThreads) {
    const int32_t slot = keep[i], before = i == 0 ? -1 : keep[i - 1];
    // Below i where an earlier one does not ascend: then page(i) may lie past the table.
    finding.note(slot <= before || slot < i || slot >= slots, Wrong::kKeep, slot, slots);
    if (finding.wrong != Wrong::kNothing) break;
    for (const int32_t page : {page_size.page(slot), page_size.page(i)}) {
      const int32_t physical = p.table.at(b, h, page);
      finding.note(physical < 0 || physical >= p.cache.num_pages, Wrong::kPageTable, physical, p.cache.num_pages - 1);
    }
  }
  return __syncthreads_and(finding.wrong == Wrong::kNothing);
}

// Ascending order makes keep[i] >= i. A tile of rows is read before any of it is written, and later tiles are read from
// behind it: one barrier a tile is enough.
__global__ void __launch_bounds__(kThreads)
    compact_kv_kernel(const __grid_constant__ CompactKvParams p, ErrorWord* errors) {
  const int32_t h = blockIdx.x, b = blockIdx.y;
  wait_for_previous();
  let_next_start();
  const PageSize page_size(p.cache.page_size);
  const PagedBuffer& buffer = blockIdx.z == 0 ? p.cache.k : p.cache.v;
  const int32_t* const keep = p.keep + b * p.keep_stride_b + h * p.keep_stride_h;
  Finding finding;
  const bool right = all_right(p, b, h, keep, page_size, finding);
  finding.report(errors, Op::kCompactKv, b);
  if (!right) return;
  const auto row = [&](int32_t slot) {
    const int64_t physical = p.table.at(b, h, page_size.page(slot));
    const int64_t at =
        physical * buffer.stride_page + h * buffer.stride_head + page_size.slot(slot) * buffer.stride_token;
    return reinterpret_cast<uint4*>(static_cast<char*>(buffer.data) + at * p.element_size);
  };
  const int32_t row_vectors = static_cast<int32_t>(p.cache.head_dim * p.element_size / sizeof(uint4));
  const int32_t rows = kTile / row_vectors, count = p.counts[b];
#pragma unroll 1
  for (int32_t first = 0; first < count; first += rows) {
    const int32_t here = min(rows, count - first) * row_vectors;
    uint4 held[kVectors];
#pragma unroll
    for (int j = 0; j < kVectors; ++j) {
      const int32_t i = threadIdx.x + j * kThreads;
      if (i < here) held[j] = row(keep[first + i / row_vectors])[i % row_vectors];
    }
    __syncthreads();
#pragma unroll
    for (int j = 0; j < kVectors; ++j) {
      const int32_t i = threadIdx.x + j * kThreads;
      if (i < here) row(first + i / row_vectors)[i % row_vectors] = held[j];
    }
  }
}

}  // namespace

void compact_kv(const CompactKvParams& p, const Tensor& on) {
  const Launch launch(on);
  launch(compact_kv_kernel, dim3(p.cache.kv_heads, p.batch, 2), kThreads, 0, 1, p, error_word());
}

}  // namespace lil::cuda

#include "cuda/append_kv.cuh"
#include "cuda/backend.h"
#include "cuda/launch.cuh"

namespace lil::cuda {
namespace {

constexpr int kWarps = 4;

// The sequence whose tokens hold `row`: the last whose offset is not above it.
__device__ int32_t sequence_of(const int32_t* cu_seqlens, int32_t batch, int32_t row) {
  int32_t low = 0, high = batch - 1;
  while (low < high) {
    const int32_t middle = (low + high + 1) / 2;
    cu_seqlens[middle] <= row ? low = middle : high = middle - 1;
  }
  return low;
}

template <class T, class S>
__global__ void append_kv_kernel(const __grid_constant__ AppendKvParams p, ErrorWord* errors) {
  wait_for_previous();
  let_next_start();
  const int32_t row = blockIdx.x * kWarps + threadIdx.x / 32, batch = static_cast<int32_t>(p.batch);
  if (p.cu_seqlens && blockIdx.x == 0 && blockIdx.y == 0) {
#pragma unroll 1
    for (int32_t b = threadIdx.x; b < batch; b += blockDim.x) {
      const int32_t first = p.cu_seqlens[b], last = p.cu_seqlens[b + 1];
      if (first < 0 || first > last || last > p.tokens) {
        report(errors, Op::kAppendKv, Wrong::kCuSeqlens, b, first < 0 ? first : last, p.tokens);
      }
    }
  }
  if (row >= p.tokens) return;
  const int32_t b = p.cu_seqlens ? sequence_of(p.cu_seqlens, batch, row) : row;
  const int32_t first = p.cu_seqlens ? p.cu_seqlens[b] : row, last = p.cu_seqlens ? p.cu_seqlens[b + 1] : row + 1;
  if (first < 0 || row < first || row >= last || last > p.tokens) return;
  Finding finding;
  append_token<T, S>(p, row, b, blockIdx.y, first, last, finding);
  finding.report(errors, Op::kAppendKv, b);
}

}  // namespace

void append_kv(const AppendKvParams& p, const Tensor& on) {
  if (p.tokens == 0 || p.cache.kv_heads == 0) return;
  const Launch launch(on);
  const dim3 grid((p.tokens + kWarps - 1) / kWarps, p.cache.kv_heads);
  with_dtype(p.cache.dtype, [&]<class T>(const T*) {
    const auto kernel = p.summary.dtype == DType::kFloat8E4M3 ? append_kv_kernel<T, Float8> : append_kv_kernel<T, T>;
    launch(kernel, grid, 32 * kWarps, 0, 1, p, error_word());
  });
}

}  // namespace lil::cuda

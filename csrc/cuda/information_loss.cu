// information_loss: one block a (sequence, KV head). Bits of shared memory say which pages of a window were read.
#include "cuda/backend.h"
#include "cuda/launch.cuh"
#include "cuda/loss.cuh"
#include "cuda/pages.cuh"

namespace lil::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int32_t kWindow = 65536;  // pages

// A sum of powers of two, relative to the largest so far.
struct Log2Sum {
  float max = -INFINITY, sum = 0;

  __device__ void add(float log2_weight, float times) {
    if (log2_weight == -INFINITY) return;
    const float high = max_nan(max, log2_weight);
    sum = sum * (max == high ? 1 : exp2f(max - high)) + times * (log2_weight == high ? 1 : exp2f(log2_weight - high));
    max = high;
  }
  __device__ float log2() const { return max == -INFINITY ? max : max + log2f(sum); }
};

__global__ void __launch_bounds__(kThreads)
    information_loss_kernel(const __grid_constant__ InformationLossParams p, ErrorWord* errors) {
  __shared__ uint32_t read[kWindow / 32];
  __shared__ float max[kThreads], sum[kThreads];
  const int32_t h = blockIdx.x, b = blockIdx.y;
  wait_for_previous();
  let_next_start();
  Finding finding;
  const PageSize page_size(p.page_size);
  const int32_t length = checked_length(finding, p.seq_lens, b, p.max_pages << page_size.shift);
  const int32_t pages = page_size.pages(length);
  int32_t entries = p.counts ? p.counts[b * p.kv_heads + h] : static_cast<int32_t>(p.capacity);
  const bool bad = entries < 0 || entries > p.capacity;
  finding.note(bad, Wrong::kCounts, entries, p.capacity);
  if (bad) entries = 0;
  const int32_t* const list = p.pages + b * p.pages_stride_b + h * p.pages_stride_h;
  const float* const scores = p.scores + b * p.stride_b + h * p.stride_h;

  Log2Sum mine;
#pragma unroll 1
  for (int32_t first = 0; first < pages; first += kWindow) {
    const int32_t here = min(kWindow, pages - first);
    for (int32_t i = threadIdx.x; i < ceil_div(here, 32); i += kThreads) read[i] = 0;
    __syncthreads();
#pragma unroll 1
    for (int32_t i = threadIdx.x; i < entries; i += kThreads) {
      const int32_t page = list[i];
      finding.note(page < -1 || page >= pages, Wrong::kPages, page, pages - 1);
      const int32_t at = page - first;
      if (page >= 0 && at >= 0 && at < here) atomicOr(&read[at / 32], 1u << at % 32);
    }
    __syncthreads();
#pragma unroll 1
    for (int32_t i = threadIdx.x; i < here; i += kThreads) {
      if (read[i / 32] >> i % 32 & 1) continue;
      const int32_t tokens = min(page_size.first(1), length - page_size.first(first + i));
      mine.add(log2_weight(scores[first + i], p.softcap), tokens);
    }
    __syncthreads();
  }
  finding.report(errors, Op::kInformationLoss, b);

  // In one order whatever the block's timing.
  max[threadIdx.x] = mine.max, sum[threadIdx.x] = mine.sum;
#pragma unroll 1
  for (int32_t half = kThreads / 2; half > 0; half /= 2) {
    __syncthreads();
    if (threadIdx.x >= half) continue;
    mine.add(max[threadIdx.x + half], sum[threadIdx.x + half]);
    max[threadIdx.x] = mine.max, sum[threadIdx.x] = mine.sum;
  }
  __syncthreads();
  const float unread = Log2Sum{max[0], sum[0]}.log2();
#pragma unroll 1
  for (int32_t g = threadIdx.x; g < p.group; g += kThreads) {
    const int64_t row = (b * p.kv_heads + h) * p.group + g;
    p.loss[row] = lost_share(p.lse[row] * kLog2E, 1, unread);
  }
}

}  // namespace

void information_loss(const InformationLossParams& p, const Tensor& on) {
  const Launch launch(on);
  launch(information_loss_kernel, dim3(p.kv_heads, p.batch), kThreads, 0, 1, p, error_word());
}

}  // namespace lil::cuda

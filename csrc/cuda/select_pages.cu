#include <algorithm>

#include "cuda/backend.h"
#include "cuda/launch.cuh"
#include "cuda/select_pages.cuh"

namespace lil::cuda {
namespace {

constexpr int kThreads = kMostThreads;

template <bool kStaged>
__global__ void __launch_bounds__(kThreads)
    select_pages_kernel(const __grid_constant__ SelectPagesParams p, ErrorWord* errors) {
  __shared__ SelectScratch scratch;
  extern __shared__ uint4 staged[];
  const int32_t h = blockIdx.x, b = blockIdx.y, capacity = static_cast<int32_t>(p.capacity);
  wait_for_previous();
  let_next_start();
  Finding finding;
  const PageSize page_size(p.page_size);
  const int32_t length = checked_length(finding, p.seq_lens, b, p.max_pages << page_size.shift);
  const int32_t pages = page_size.pages(length);
  int32_t* const out = p.pages + (b * p.kv_heads + h) * p.capacity;
  if (threadIdx.x == 0) {
    p.counts[b * p.kv_heads + h] = min(pages, capacity);
    finding.report(errors, Op::kSelectPages, b);
  }
  if (pages > capacity) {
    select_pages_of<kStaged>(scratch, p, b, h, length, reinterpret_cast<uint32_t*>(staged), out, false);
  } else {
#pragma unroll 1
    for (int32_t i = threadIdx.x; i < capacity; i += kThreads) out[i] = i < pages ? i : -1;
  }
}

}  // namespace

void select_pages(const SelectPagesParams& p, const Tensor& on) {
  const Launch launch(on);
  const auto start = [&]<bool kStaged>(size_t shared) {
    allow_shared<select_pages_kernel<kStaged>>(shared);
    launch(select_pages_kernel<kStaged>, dim3(p.kv_heads, p.batch), kThreads, shared, 1, p, error_word());
  };
  const size_t keys = key_words(p.max_pages, kThreads) * sizeof(uint32_t);
  const bool fits = keys + sizeof(SelectScratch) <= current_device().max_shared;
  fits ? start.operator()<true>(keys) : start.operator()<false>(0);
}

}  // namespace lil::cuda

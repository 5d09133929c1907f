#include "cuda/select_pages.cuh"

#include "cuda/backend.h"
#include "cuda/launch.cuh"

namespace lil::cuda {
namespace {

constexpr int kThreads = 512;

__global__ void __launch_bounds__(kThreads) select_pages_kernel(const __grid_constant__ SelectPagesParams p,
                                                                ErrorWord* errors) {
  __shared__ SelectScratch scratch;
  const int32_t h = blockIdx.x, b = blockIdx.y, capacity = static_cast<int32_t>(p.capacity);
  wait_for_previous();
  const int32_t length = checked_length(Op::kSelectPages, p.seq_lens, b, p.max_pages * p.page_size, errors);
  const int32_t pages = ceil_div(length, static_cast<int32_t>(p.page_size));
  int32_t* const out = p.pages + (b * p.kv_heads + h) * p.capacity;
  if (threadIdx.x == 0) p.counts[b * p.kv_heads + h] = min(pages, capacity);
  if (pages > capacity) {
    select_pages_of(scratch, p, b, h, length, out);
  } else {
    for (int32_t i = threadIdx.x; i < capacity; i += kThreads) out[i] = i < pages ? i : -1;
  }
}

}  // namespace

void select_pages(const SelectPagesParams& p, const Tensor& on) {
  const Launch launch(on);
  launch(select_pages_kernel, dim3(p.kv_heads, p.batch), kThreads, 0, 1, p, error_word());
}

}  // namespace lil::cuda

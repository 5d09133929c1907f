// represent_page: one block a (sequence, KV head). Its threads add what the listed tokens got; where a page leaves the
// window they rank its tokens by comparing all with all, and then have an element of the keys each.
#include "cuda/backend.h"
#include "cuda/launch.cuh"
#include "cuda/numbers.cuh"
#include "cuda/pages.cuh"
#include "represent_page.h"

namespace lil::cuda {
namespace {

constexpr int kThreads = 256;  // at least the tokens of a page, and the elements of a key

// Adds what the tokens inside the window got, summed over the group in the order of its heads.
__device__ void gather(const RepresentPageParams& p, PageSize page_size, int32_t b, int32_t h, int32_t length,
                       float* weight, Finding& finding) {
  const int32_t first = static_cast<int32_t>(first_inside(p, length)), most = page_size.pages(length) - 1;
  int32_t entries = p.counts ? p.counts[b * p.cache.kv_heads + h] : static_cast<int32_t>(p.capacity);
  const bool bad = entries < 0 || entries > p.capacity;
  finding.note(bad, Wrong::kCounts, entries, p.capacity);
  if (bad) return;
  const int32_t* const list = p.pages + b * p.pages_stride_b + h * p.pages_stride_h;
  const int64_t width = p.capacity << page_size.shift;
  const float* const mass = p.mass + (b * p.cache.kv_heads + h) * p.group * width;
  const int32_t group = static_cast<int32_t>(p.group);
#pragma unroll 4
  for (int32_t i = threadIdx.x; i < entries << page_size.shift; i += kThreads) {
    const int32_t page = list[page_size.page(i)];
    const bool wrong = page < -1 || page > most;
    finding.note(wrong, Wrong::kPages, page, most);
    if (wrong || page < 0) continue;
    const int32_t token = page_size.first(page) + page_size.slot(i);
    if (token < first || token >= length) continue;
    float sum = 0;
#pragma unroll 8
    for (int32_t g = 0; g < group; ++g) sum += mass[g * width + i];
    weight[token] += sum;
  }
}

// The mean of the heaviest keys of a page, whose tokens have these weights, added up from the heaviest on.
template <class T>
__device__ void represent(const RepresentPageParams& p, const float* weight, int64_t physical, int32_t h) {
  __shared__ float weights[kThreads];
  __shared__ int32_t heaviest[kMaxRepresentatives];
  const int32_t tokens = static_cast<int32_t>(p.cache.page_size), t = threadIdx.x;
  const int32_t representatives = static_cast<int32_t>(p.representatives);
  if (t < tokens) weights[t] = weight[t];
  __syncthreads();
  if (t < tokens) {
    int32_t before = 0;
#pragma unroll 8
    for (int32_t other = 0; other < tokens; ++other) before += comes_before(weights[other], other, weights[t], t);
    if (before < representatives) heaviest[before] = t;
  }
  __syncthreads();
  if (t >= p.cache.head_dim) return;
  const PagedBuffer& k = p.cache.k;
  const T* const keys = static_cast<const T*>(k.data) + physical * k.stride_page + h * k.stride_head + t;
  float sum = to_float(keys[heaviest[0] * k.stride_token]);
#pragma unroll 4
  for (int32_t r = 1; r < representatives; ++r) sum += to_float(keys[heaviest[r] * k.stride_token]);
  const float mean = sum / static_cast<float>(representatives);
  const int64_t at = physical * p.summary.stride_page + h * p.summary.stride_head + t;
  if (p.summary.dtype == DType::kFloat8E4M3) {
    static_cast<Float8*>(p.summary.data)[at] = from_float<Float8>(mean);
  } else {
    static_cast<T*>(p.summary.data)[at] = from_float<T>(mean);
  }
}

template <class T>
__global__ void __launch_bounds__(kThreads)
    represent_page_kernel(const __grid_constant__ RepresentPageParams p, ErrorWord* errors) {
  const int32_t h = blockIdx.x, b = blockIdx.y;
  const PageSize page_size(p.cache.page_size);
  Finding finding;
  wait_for_previous();
  let_next_start();
  const int32_t length = checked_length(finding, p.seq_lens, b, p.table.max_pages << page_size.shift);
  float* const weight = p.weight + (b * p.cache.kv_heads + h) * (p.table.max_pages << page_size.shift);
  gather(p, page_size, b, h, length, weight, finding);
  const int32_t page = static_cast<int32_t>(leaving_page(p, length));
  const int64_t physical = page < 0 ? -1 : checked_page(finding, p.table, b, h, page, p.cache.num_pages);
  if (physical >= 0) {
    __syncthreads();  // the weights are complete
    represent<T>(p, weight + page_size.first(page), physical, h);
  }
  finding.report(errors, Op::kRepresentPage, b);
}

}  // namespace

void represent_page(const RepresentPageParams& p, const Tensor& on) {
  const Launch launch(on);
  with_dtype(p.cache.dtype, [&]<class T>(const T*) {
    launch(represent_page_kernel<T>, dim3(p.cache.kv_heads, p.batch), kThreads, 0, 1, p, error_word());
  });
}

}  // namespace lil::cuda

#include "api/sparse_decode_step.h"
#include "cuda/score_pages_launch.h"
#include "cuda/sparse_decode.cuh"

namespace lil::cuda {
namespace {

void attend(const SparseDecodeParams& p, const Selecting& select, const Tensor& on) {
  const Launch launch(on);
  const bool mma = p.q_dtype != DType::kFloat32 && (p.q_dtype == p.cache.dtype || p.cache.dtype == DType::kFloat8E4M3);
  with_dtype(p.cache.dtype, [&]<class T>(const T*) {
    if constexpr (!std::is_same_v<T, float>) {
      if (mma) {
        return with_head_dim(p.cache.head_dim,
                             [&]<class D>(D) { launch_sparse_decode_mma<T, D::value>(p, select, launch, on); });
      }
    }
    launch_sparse_decode<FmaEngine<T>>(p, select, launch, on);
  });
}

// Logits in p.token_mass become shares, and their sums go to `page_mass`. Tokens beyond the list get 0, and so
// does what was not read (a logit of -inf). A group of lanes takes an entry. Grid: [kv_heads * group, batch].
__global__ void sparse_decode_mass(const __grid_constant__ SparseDecodeParams p) {
  const int32_t page_tokens = static_cast<int32_t>(p.cache.page_size), lanes = min(page_tokens, 32);
  const int32_t b = blockIdx.y, h = blockIdx.x / static_cast<int32_t>(p.group);
  const int64_t row = b * p.cache.kv_heads * p.group + blockIdx.x, capacity = p.entries_capacity();
  wait_for_previous();
  let_next_start();
  Finding finding;  // the attention has reported it
  const PageSize page_size(page_tokens);
  int64_t entries = page_size.pages(checked_length(finding, p.seq_lens, b, p.table.max_pages << page_size.shift));
  if (p.selected) {
    entries = p.counts ? p.counts[b * p.cache.kv_heads + h] : capacity;
    if (entries < 0 || entries > capacity) entries = 0;
  }
  const float lse = p.lse[row];
  float* const logits = p.token_mass + row * capacity * page_tokens;
#pragma unroll 1
  for (int64_t entry = threadIdx.x / lanes; entry - threadIdx.x / lanes < capacity; entry += blockDim.x / lanes) {
    float sum = 0;
#pragma unroll 1
    for (int32_t t = threadIdx.x % lanes; t < page_tokens && entry < capacity; t += lanes) {
      float& logit = logits[entry * page_tokens + t];
      const bool read = entry < entries && lse != -INFINITY && logit != -INFINITY;
      const float share = read ? exp2_approx(logit - lse * kLog2E) : 0;
      logit = share;
      sum += share;
    }
#pragma unroll
    for (int32_t step = 16; step > 0; step /= 2) {
      const float other = __shfl_xor_sync(~0u, sum, step);
      if (step < lanes) sum += other;
    }
    if (p.page_mass && entry < capacity && threadIdx.x % lanes == 0) p.page_mass[row * capacity + entry] = sum;
  }
}

}  // namespace

void sparse_decode(const SparseDecodeParams& p, const Tensor& on) {
  if (!p.page_mass && !p.token_mass) return attend(p, {}, on);
  const Launch launch(on);
  const int64_t rows = p.batch * p.cache.kv_heads * p.group, width = p.entries_capacity() * p.cache.page_size;
  if (width == 0) return attend(p, {}, on);
  SparseDecodeParams with_logits = p;
  std::optional<Tensor> logits;
  if (!p.token_mass) {
    logits = torch::stable::new_empty(on, {rows * width}, ScalarType::Float);
    with_logits.token_mass = static_cast<float*>(logits->mutable_data_ptr());
  }
  attend(with_logits, {}, on);
  launch(sparse_decode_mass, dim3(p.cache.kv_heads * p.group, p.batch), 256, 0, 1, with_logits);
}

// Two launches (where a cluster merges the splits): append and score, then select and attend.
void sparse_decode_step(const SparseDecodeStepParams& p, const Tensor& on) {
  append_and_score(p.append, p.score, on);
  // Shared memory holds the list of pages and the keys of all beside the rest; where they are more, launches more cost
  // little beside the reading.
  const Launch launch(on);  // the device is current
  const bool roomy = current_device().max_shared > 160 * 1024;
  const int64_t max_listed = roomy ? 2048 : 1024, max_scored = roomy ? 16384 : 8192;
  if (p.select.capacity <= max_listed && p.select.max_pages <= max_scored) {
    return attend(p.attend, {p.select, p.loss}, on);
  }
  SelectPagesParams select = p.select;
  const auto [pages, counts] = select_pages_outputs(select, on);
  select_pages(select, on);
  attend(with_selection(p.attend, select), {}, on);
  if (p.loss) information_loss(information_loss_of(p, select), on);
}

}  // namespace lil::cuda

#include "api/sparse_decode_step.h"
#include "cuda/score_pages_launch.h"
#include "cuda/sparse_decode.cuh"

namespace lil::cuda {
namespace {

void attend(const SparseDecodeParams& p, const SelectPagesParams& select, const Tensor& on) {
  const Launch launch(on);
  const bool mma = p.q_dtype == p.cache.dtype && p.q_dtype != DType::kFloat32;
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

}  // namespace

void sparse_decode(const SparseDecodeParams& p, const Tensor& on) { attend(p, {}, on); }

// Two launches (where a cluster merges the splits): append and score, then select and attend.
void sparse_decode_step(const SparseDecodeStepParams& p, const Tensor& on) {
  append_and_score(p.append, p.score, on);
  // Shared memory holds the list of pages and the keys of all beside the rest; where they are more, a launch more costs
  // little beside the reading.
  const Launch launch(on);  // the device is current
  const int64_t max_listed = 2048, max_scored = current_device().max_shared > 160 * 1024 ? 16384 : 8192;
  if (p.select.capacity <= max_listed && p.select.max_pages <= max_scored) return attend(p.attend, p.select, on);
  SelectPagesParams select = p.select;
  const auto [pages, counts] = select_pages_outputs(select, on);
  select_pages(select, on);
  attend(with_selection(p.attend, select), {}, on);
}

}  // namespace lil::cuda

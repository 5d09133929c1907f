#include "api/sparse_decode_step.h"

#include "cpu/backend.h"

namespace lil::cpu {

// Scoring comes before appending, which alone writes: by then every value has been checked. The page that the append
// changes is read whatever its score, so the order does not show.
void sparse_decode_step(const SparseDecodeStepParams& p, const Tensor& on) {
  score_pages(p.score, on);
  SelectPagesParams select = p.select;
  const auto [pages, counts] = select_pages_outputs(select, on);
  select_pages(select, on);
  append_kv(p.append, on);
  sparse_decode(with_selection(p.attend, select), on);
  if (p.loss) information_loss(information_loss_of(p, select), on);
}

}  // namespace lil::cpu

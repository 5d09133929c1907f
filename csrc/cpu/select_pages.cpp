#include <algorithm>

#include "cpu/backend.h"
#include "cpu/kernels/kernels.h"
#include "cpu/values.h"

namespace lil::cpu {

void select_pages(const SelectPagesParams& p, const Tensor&) {
  check_seq_lens("select_pages", p.seq_lens, p.batch, p.max_pages * p.page_size);
  // Below some thousands of scores a thread costs more than it saves.
  const int64_t grain = std::max<int64_t>(1, 4096 / std::max<int64_t>(1, p.max_pages));
  const Kernels& isa = kernels();
  torch::stable::parallel_for(0, p.batch * p.kv_heads, grain,
                              [&](int64_t begin, int64_t end) { isa.select_pages(p, begin, end); });
}

}  // namespace lil::cpu

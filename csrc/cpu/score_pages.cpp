#include "cpu/backend.h"
#include "cpu/kernels/kernels.h"
#include "cpu/values.h"

namespace lil::cpu {

void score_pages(const ScorePagesParams& p, const Tensor&) {
  const char* op = "score_pages";
  check_seq_lens(op, p.seq_lens, p.batch, p.pages.max_pages * p.page_size);
  for (int64_t b = 0; b < p.batch; ++b) {
    for (int64_t h = 0; h < table_heads(p.pages, p.kv_heads); ++h) {
      for (int64_t page = 0; page < pages_of(p.seq_lens[b], p.page_size); ++page) {
        check_read_page(op, p.pages, b, h, page, p.num_pages);
      }
    }
  }
  const int64_t blocks = pages_of(p.pages.max_pages, kScoreBlock);
  const Kernels& isa = kernels();
  torch::stable::parallel_for(0, p.batch * p.kv_heads * blocks, 1,
                              [&](int64_t begin, int64_t end) { isa.score_pages(p, begin, end); });
}

}  // namespace lil::cpu

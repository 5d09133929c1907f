#include "represent_page.h"

#include "cpu/backend.h"
#include "cpu/kernels/kernels.h"
#include "cpu/values.h"

namespace lil::cpu {

void represent_page(const RepresentPageParams& p, const Tensor&) {
  const char* op = "represent_page";
  const int64_t page_size = p.cache.page_size, kv_heads = p.cache.kv_heads;
  check_seq_lens(op, p.seq_lens, p.batch, p.table.max_pages * page_size);
  for (int64_t b = 0; b < p.batch; ++b) {
    const int64_t pages = pages_of(p.seq_lens[b], page_size), leaving = leaving_page(p, p.seq_lens[b]);
    for (int64_t h = 0; h < kv_heads; ++h) {
      const int64_t count = checked_count(op, p.counts, p.capacity, b, h, kv_heads);
      const int32_t* const list = p.pages + b * p.pages_stride_b + h * p.pages_stride_h;
      for (int64_t i = 0; i < count; ++i) check_listed_page(op, list[i], pages, b, h);
      if (leaving >= 0) check_read_page(op, p.table, b, h, leaving, p.cache.num_pages);
    }
  }
  constexpr int64_t kGrain = 16;  // a head of a thousand tokens is some microseconds
  const Kernels& isa = kernels();
  torch::stable::parallel_for(0, p.batch * kv_heads, kGrain,
                              [&](int64_t begin, int64_t end) { isa.represent_page(p, begin, end); });
}

}  // namespace lil::cpu

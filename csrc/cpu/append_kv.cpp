#include <algorithm>
#include <vector>

#include "cpu/backend.h"
#include "cpu/kernels/kernels.h"
#include "cpu/values.h"

namespace lil::cpu {

void append_kv(const AppendKvParams& p, const Tensor&) {
  const char* op = "append_kv";
  const int64_t page_size = p.cache.page_size;
  check_seq_lens(op, p.seq_lens, p.batch, p.pages.max_pages * page_size);
  thread_local std::vector<AppendItem> items;
  items.clear();
  for (int64_t b = 0; b < p.batch; ++b) {
    const int64_t first = p.cu_seqlens ? p.cu_seqlens[b] : b, last = p.cu_seqlens ? p.cu_seqlens[b + 1] : b + 1;
    LIL_CHECK(first >= 0 && first <= last && last <= p.tokens, op, "cu_seqlens",
              text("ascending offsets into ", p.tokens, " tokens at sequence ", b), text(first, " and ", last));
    LIL_CHECK(last - first <= p.seq_lens[b], op, "seq_lens",
              text("at least the ", last - first, " tokens that sequence ", b, " adds"), text(p.seq_lens[b]));
    const int64_t begin = p.seq_lens[b] - (last - first);
    for (int64_t slot = begin; slot < p.seq_lens[b];) {
      const int64_t page = slot / page_size;
      const int64_t stop = std::min<int64_t>((page + 1) * page_size, p.seq_lens[b]);
      for (int64_t h = 0; h < table_heads(p.pages, p.cache.kv_heads); ++h) {
        check_physical_page(op, p.pages, b, h, page, p.cache.num_pages);
      }
      const auto in_page = [&](int64_t s) { return static_cast<int32_t>(s - page * page_size); };
      items.push_back({static_cast<int32_t>(b), static_cast<int32_t>(page), in_page(slot), in_page(stop),
                       first + slot - begin, in_page(stop)});
      slot = stop;
    }
  }
  const int64_t work = static_cast<int64_t>(items.size()) * p.cache.kv_heads;
  const AppendItem* list = items.data();
  constexpr int64_t kGrain = 32;  // a page of one head is a microsecond at most
  const Kernels& isa = kernels();
  torch::stable::parallel_for(0, work, kGrain, [&](int64_t begin, int64_t end) { isa.append_kv(p, list, begin, end); });
}

}  // namespace lil::cpu

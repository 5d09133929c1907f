#include <algorithm>
#include <vector>

#include "cpu/backend.h"
#include "cpu/kernels/kernels.h"
#include "cpu/values.h"

namespace lil::cpu {

void append_kv(const AppendKvParams& p, const Tensor&) {
  const char* op = "append_kv";
  const int64_t page_size = p.cache.page_size, kv_heads = p.cache.kv_heads;
  check_seq_lens(op, p.seq_lens, p.batch, p.pages.max_pages * page_size);
  thread_local std::vector<AppendItem> items;
  items.clear();
  for (int64_t b = 0; b < p.batch; ++b) {
    const int64_t first = p.cu_seqlens ? p.cu_seqlens[b] : b, last = p.cu_seqlens ? p.cu_seqlens[b + 1] : b + 1;
    const int64_t length = p.seq_lens[b];
    if (!p.cu_seqlens && length == 0) continue;  // takes no part
    LIL_CHECK(first >= 0 && first <= last && last <= p.tokens, op, "cu_seqlens",
              text("ascending offsets into ", p.tokens, " tokens at sequence ", b), text(first, " and ", last));
    LIL_CHECK(last - first <= length, op, "seq_lens",
              text("at least the ", last - first, " tokens that sequence ", b, " adds"), text(length));
    // Places [begin, end) of one page of head h take the tokens from row `token` on.
    const auto add = [&](int64_t h, int64_t begin, int64_t end, int64_t token) {
      const int64_t page = begin / page_size, start = page * page_size;
      check_physical_page(op, p.pages, b, h, page, p.cache.num_pages);
      items.push_back({static_cast<int32_t>(b), static_cast<int32_t>(h), static_cast<int32_t>(page),
                       static_cast<int32_t>(begin - start), static_cast<int32_t>(end - start),
                       static_cast<int32_t>(std::min(page_size, length - start)), token});
    };
    if (p.slots) {
      for (int64_t h = 0; h < kv_heads; ++h) {
        const int64_t slot = p.slots[b * kv_heads + h], place = slot == -1 ? length - 1 : slot;
        LIL_CHECK(place >= 0 && place < length, op, "slots",
                  text("-1 or a slot from 0 to ", length - 1, " for sequence ", b, ", KV head ", h), text(slot));
        add(h, place, place + 1, first);
      }
      continue;
    }
    const int64_t begin = length - (last - first);
    for (int64_t place = begin; place < length;) {
      const int64_t stop = std::min((place / page_size + 1) * page_size, length);
      for (int64_t h = 0; h < kv_heads; ++h) add(h, place, stop, first + place - begin);
      place = stop;
    }
  }
  const AppendItem* list = items.data();
  constexpr int64_t kGrain = 32;  // a page of one head is a microsecond at most
  const Kernels& isa = kernels();
  torch::stable::parallel_for(0, static_cast<int64_t>(items.size()), kGrain,
                              [&](int64_t begin, int64_t end) { isa.append_kv(p, list, begin, end); });
}

}  // namespace lil::cpu

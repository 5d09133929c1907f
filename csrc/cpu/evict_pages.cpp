#include "evict_pages.h"

#include "cpu/backend.h"
#include "cpu/values.h"

namespace lil::cpu {
namespace {

int32_t evict_page_of(const EvictPagesParams& p, int64_t b, int64_t h) {
  const Eviction eviction(p, b, p.seq_lens[b]);
  const int64_t first = (b * p.kv_heads + h) * p.capacity;
  uint64_t least = Eviction::kRecent;
  int32_t slot = 0;
  for (int32_t s = 0; s < p.capacity; ++s) {
    const uint64_t key = eviction.key(p.held[first + s], p.priority[first + s]);
    if (key < least) least = key, slot = s;
  }
  return eviction.fill(p, b, h, slot, least);
}

}  // namespace

void evict_pages(const EvictPagesParams& p, const Tensor&) {
  const char* op = "evict_pages";
  check_seq_lens(op, p.seq_lens, p.batch, p.max_tokens);
  for (int64_t b = 0; b < p.batch; ++b) {
    if (p.seq_lens[b] == 0) continue;  // takes no part
    for (int64_t s = 0; p.slot_pages && s < p.capacity; ++s) {
      const int32_t page = p.slot_pages[b * p.capacity + s];
      LIL_CHECK(page >= 0, op, "slot_pages", text("a page for slot ", s, " of sequence ", b), text(page));
    }
    const int32_t newest = Eviction(p, b, p.seq_lens[b]).newest();
    for (int64_t i = 0; i < p.kv_heads * p.capacity; ++i) {
      const int32_t page = p.held[b * p.kv_heads * p.capacity + i];
      LIL_CHECK(page >= -1 && page <= newest, op, "held",
                text("-1 or a page from 0 to ", newest, " for sequence ", b, ", KV head ", i / p.capacity), text(page));
    }
  }
  constexpr int64_t kGrain = 16;  // a head of some hundred slots is a microsecond
  torch::stable::parallel_for(0, p.batch * p.kv_heads, kGrain, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) p.slots[i] = evict_page_of(p, i / p.kv_heads, i % p.kv_heads);
  });
}

}  // namespace lil::cpu

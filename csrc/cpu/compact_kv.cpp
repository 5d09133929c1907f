#include <cstring>

#include "cpu/backend.h"
#include "cpu/values.h"

namespace lil::cpu {
namespace {

const int32_t* keep_of(const CompactKvParams& p, int64_t b, int64_t h) {
  return p.keep + b * p.keep_stride_b + h * p.keep_stride_h;
}

// Ascending order makes keep[i] >= i: what is still to be read lies at or behind what is written.
void move(const CompactKvParams& p, const PagedBuffer& buffer, int64_t b, int64_t h) {
  const int64_t page_size = p.cache.page_size;
  const auto row = [&](int64_t slot) {
    const int64_t physical = p.table.at(b, h, slot / page_size);
    return static_cast<char*>(buffer.data) + p.element_size * (physical * buffer.stride_page + h * buffer.stride_head +
                                                               slot % page_size * buffer.stride_token);
  };
  const int32_t* const keep = keep_of(p, b, h);
  for (int64_t i = 0; i < p.counts[b]; ++i) {
    if (keep[i] != i) std::memcpy(row(i), row(keep[i]), p.cache.head_dim * p.element_size);
  }
}

}  // namespace

void compact_kv(const CompactKvParams& p, const Tensor&) {
  const char* op = "compact_kv";
  const int64_t page_size = p.cache.page_size, slots = p.table.max_pages * page_size;
  for (int64_t b = 0; b < p.batch; ++b) {
    const int64_t count = p.counts[b];
    LIL_CHECK(count >= 0 && count <= p.capacity, op, "counts", text("0 to ", p.capacity, " slots for sequence ", b),
              text(count));
    for (int64_t h = 0; h < p.cache.kv_heads; ++h) {
      const int32_t* const keep = keep_of(p, b, h);
      for (int64_t i = 0; i < count; ++i) {
        const int32_t slot = keep[i], least = i == 0 ? 0 : keep[i - 1] + 1;
        LIL_CHECK(slot >= least && slot < slots, op, "keep",
                  text("ascending slots below ", slots, " for sequence ", b, ", KV head ", h), text(slot));
        check_physical_page(op, p.table, b, h, slot / page_size, p.cache.num_pages);
        check_physical_page(op, p.table, b, h, i / page_size, p.cache.num_pages);
      }
    }
  }
  torch::stable::parallel_for(0, p.batch * p.cache.kv_heads, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      move(p, p.cache.k, i / p.cache.kv_heads, i % p.cache.kv_heads);
      move(p, p.cache.v, i / p.cache.kv_heads, i % p.cache.kv_heads);
    }
  });
}

}  // namespace lil::cpu

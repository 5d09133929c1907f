#include <algorithm>
#include <vector>

#include "cpu/backend.h"
#include "cpu/kernels/kernels.h"
#include "cpu/values.h"

namespace lil::cpu {
namespace {

// From the sums of the rows, which are those of the columns, to the means of what is left of the columns.
void settle(const KeyRedundancyParams& p, const Dropped* dropped, int64_t b, int64_t h) {
  const int64_t n = p.seq_lens[b], head = (b * p.cache.kv_heads + h) * p.slots;
  float* const out = p.redundancy + head;
  for (int64_t i = 0; i < n; ++i) out[dropped[head + i].slot] -= dropped[head + i].cosine;
  for (int64_t i = 0; i < n; ++i) out[i] /= static_cast<float>(n);
  std::fill(out + n, out + p.slots, 0.0f);
}

}  // namespace

void key_redundancy(const KeyRedundancyParams& p, const Tensor&) {
  const char* op = "key_redundancy";
  check_seq_lens(op, p.seq_lens, p.batch, p.slots);
  const int64_t kv_heads = p.cache.kv_heads;
  for (int64_t b = 0; b < p.batch; ++b) {
    const int64_t n = p.seq_lens[b];
    LIL_CHECK(n <= p.positions_capacity, op, "positions", text("a capacity of at least ", n, " for sequence ", b),
              text(p.positions_capacity));
    for (int64_t h = 0; h < table_heads(p.table, kv_heads); ++h) {
      for (int64_t page = 0; page < pages_of(n, p.cache.page_size); ++page) {
        check_physical_page(op, p.table, b, h, page, p.cache.num_pages);
      }
    }
    for (int64_t h = 0; p.positions && h < kv_heads; ++h) {
      for (int64_t slot = 0; slot < n; ++slot) {
        LIL_CHECK(p.position(b, h, slot) >= 0, op, "positions",
                  text("at least 0 for slot ", slot, " of sequence ", b, ", KV head ", h),
                  text(p.position(b, h, slot)));
      }
    }
  }
  thread_local std::vector<Dropped> dropped_slots;  // grows to the largest call and stays
  dropped_slots.resize(p.batch * kv_heads * p.slots);
  Dropped* const dropped = dropped_slots.data();
  const Kernels& isa = kernels();
  const int64_t blocks = pages_of(p.slots, kRedundancyRows);
  torch::stable::parallel_for(0, p.batch * kv_heads * blocks, 1, [&](int64_t begin, int64_t end) {
    thread_local std::vector<float> scratch(kRedundancyScratch);
    isa.redundancy_rows(p, dropped, scratch.data(), begin, end);
  });
  torch::stable::parallel_for(0, p.batch * kv_heads, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) settle(p, dropped, i / kv_heads, i % kv_heads);
  });
}

}  // namespace lil::cpu

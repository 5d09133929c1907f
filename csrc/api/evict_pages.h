#pragma once

#include <torch/csrc/stable/ops.h>

#include "api/checks.h"
#include "api/select_pages.h"

namespace lil {

template <class Backend>
Tensor evict_pages(Tensor page_table, Tensor held, const Tensor& slot_pages, const Tensor& priority,
                   const Tensor& seq_lens, int64_t page_size, int64_t sink, int64_t recent,
                   const std::optional<Tensor>& protected_lens) {
  const char* op = "evict_pages";
  check_shape(held, op, "held", "[batch, kv_heads, capacity]", {-1, -1, -1});
  const int64_t batch = held.size(0), kv_heads = held.size(1), capacity = held.size(2);
  check_dense(held, held, op, "held", "[batch, kv_heads, capacity]", {batch, kv_heads, capacity});
  check_shape(page_table, op, "page_table", "[batch, kv_heads, max_pages]", {batch, kv_heads, -1});
  check_dense(slot_pages, held, op, "slot_pages", "[batch, capacity]", {batch, capacity});
  check_dense(priority, held, op, "priority", "[batch, kv_heads, capacity]", {batch, kv_heads, capacity},
              ScalarType::Float);
  check_dense(seq_lens, held, op, "seq_lens", "[batch]", {batch});
  if (protected_lens) check_dense(*protected_lens, held, op, "protected_lens", "[batch]", {batch});
  check_page_size(page_size, op, "page_size");
  const int64_t forced = forced_pages(op, page_size, sink, recent);
  LIL_CHECK(capacity >= forced, op, "held",
            text("a capacity of at least ", forced, " (the pages of ", page_size, " that sink ", sink, " and recent ",
                 recent, " can touch)"),
            text(capacity));
  const PageTable table = make_page_table(page_table, held, op, batch, kv_heads, page_size);
  Tensor slots = torch::stable::new_empty(held, {batch, kv_heads}, ScalarType::Int);
  const EvictPagesParams params{static_cast<int32_t*>(page_table.mutable_data_ptr()),
                                table.stride_b,
                                table.stride_h,
                                table.max_pages,
                                static_cast<int32_t*>(held.mutable_data_ptr()),
                                int32_data(slot_pages),
                                static_cast<const float*>(priority.const_data_ptr()),
                                int32_data(seq_lens),
                                protected_lens ? int32_data(*protected_lens) : nullptr,
                                batch,
                                kv_heads,
                                capacity,
                                page_size,
                                sink,
                                recent,
                                static_cast<int32_t*>(slots.mutable_data_ptr())};
  if (batch > 0 && kv_heads > 0) Backend::evict_pages(params, held);
  return slots;
}

}  // namespace lil

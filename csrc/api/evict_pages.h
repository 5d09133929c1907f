#pragma once

#include <torch/csrc/stable/ops.h>

#include <bit>

#include "api/checks.h"
#include "api/select_pages.h"

namespace lil {

template <class Backend>
Tensor evict_pages(Tensor held, const Tensor& priority, const Tensor& seq_lens, int64_t page_size, int64_t sink,
                   int64_t recent, const std::optional<Tensor>& protected_lens, std::optional<Tensor> page_table,
                   const std::optional<Tensor>& slot_pages) {
  const char* op = "evict_pages";
  check_shape(held, op, "held", "[batch, kv_heads, capacity]", {-1, -1, -1});
  const int64_t batch = held.size(0), kv_heads = held.size(1), capacity = held.size(2);
  check_dense(held, held, op, "held", "[batch, kv_heads, capacity]", {batch, kv_heads, capacity});
  check_dense(priority, held, op, "priority", "[batch, kv_heads, capacity]", {batch, kv_heads, capacity},
              ScalarType::Float);
  check_dense(seq_lens, held, op, "seq_lens", "[batch]", {batch});
  if (protected_lens) check_dense(*protected_lens, held, op, "protected_lens", "[batch]", {batch});
  LIL_CHECK(page_table.has_value() == slot_pages.has_value(), op, page_table ? "slot_pages" : "page_table",
            "both page_table and slot_pages, or neither", "None");
  // Without a table a page may be a single token.
  if (page_table || page_size != 1) check_page_size(page_size, op, "page_size");
  const int64_t forced = forced_pages(op, page_size, sink, recent);
  LIL_CHECK(capacity >= forced, op, "held",
            text("a capacity of at least ", forced, " (the pages of ", page_size, " that sink ", sink, " and recent ",
                 recent, " can touch)"),
            text(capacity));
  EvictPagesParams params{};
  params.priority = static_cast<const float*>(priority.const_data_ptr());
  params.seq_lens = int32_data(seq_lens);
  params.protected_lens = protected_lens ? int32_data(*protected_lens) : nullptr;
  params.batch = batch;
  params.kv_heads = kv_heads;
  params.capacity = capacity;
  params.sink = sink;
  params.recent = recent;
  params.max_tokens = INT32_MAX;
  params.page_shift = std::countr_zero(static_cast<uint64_t>(page_size));
  if (page_table) {
    check_shape(*page_table, op, "page_table", "[batch, kv_heads, max_pages]", {batch, kv_heads, -1});
    check_dense(*slot_pages, held, op, "slot_pages", "[batch, capacity]", {batch, capacity});
    const PageTable table = make_page_table(*page_table, held, op, batch, kv_heads, page_size);
    params.page_table = static_cast<int32_t*>(page_table->mutable_data_ptr());
    params.table_stride_b = table.stride_b;
    params.table_stride_h = table.stride_h;
    params.slot_pages = int32_data(*slot_pages);
    params.max_tokens = table.max_pages * page_size;
  }
  params.held = static_cast<int32_t*>(held.mutable_data_ptr());
  Tensor slots = torch::stable::new_empty(held, {batch, kv_heads}, ScalarType::Int);
  params.slots = static_cast<int32_t*>(slots.mutable_data_ptr());
  if (batch > 0 && kv_heads > 0) Backend::evict_pages(params, held);
  return slots;
}

}  // namespace lil

#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <tuple>

#include "api/checks.h"

namespace lil {

template <class Backend>
std::tuple<Tensor, Tensor> select_pages(const Tensor& scores, const Tensor& seq_lens, int64_t page_size, int64_t budget,
                                        int64_t sink, int64_t recent, const std::optional<Tensor>& protected_lens) {
  const char* op = "select_pages";
  check_shape(scores, op, "scores", "[batch, kv_heads, max_pages]", {-1, -1, -1});
  check_dtype(scores, op, "scores", ScalarType::Float);
  check_last_contiguous(scores, op, "scores");
  const int64_t batch = scores.size(0), kv_heads = scores.size(1), max_pages = scores.size(2);
  check_dense(seq_lens, scores, op, "seq_lens", "[batch]", {batch});
  if (protected_lens) check_dense(*protected_lens, scores, op, "protected_lens", "[batch]", {batch});
  check_page_size(page_size, op, "page_size");
  LIL_CHECK(sink >= 0, op, "sink", "at least 0 tokens", text(sink));
  LIL_CHECK(recent >= 1, op, "recent", "at least 1 token, the current one", text(recent));
  // Recent tokens may begin anywhere in a page, so they touch one page more than they fill.
  const int64_t forced = (sink + page_size - 1) / page_size + (recent + page_size - 2) / page_size + 1;
  LIL_CHECK(budget / page_size >= forced, op, "budget",
            text("at least ", forced * page_size, " tokens (the ", forced, " pages of ", page_size, " that sink ", sink,
                 " and recent ", recent, " can touch)"),
            text(budget));

  const int64_t budget_pages = budget / page_size, capacity = std::min(budget_pages, max_pages);
  Tensor pages = torch::stable::new_empty(scores, {batch, kv_heads, capacity}, ScalarType::Int);
  Tensor counts = torch::stable::new_empty(scores, {batch, kv_heads}, ScalarType::Int);
  const SelectPagesParams params{static_cast<const float*>(scores.const_data_ptr()),
                                 scores.stride(0),
                                 scores.stride(1),
                                 int32_data(seq_lens),
                                 protected_lens ? int32_data(*protected_lens) : nullptr,
                                 batch,
                                 kv_heads,
                                 max_pages,
                                 page_size,
                                 budget_pages,
                                 sink,
                                 recent,
                                 static_cast<int32_t*>(pages.mutable_data_ptr()),
                                 static_cast<int32_t*>(counts.mutable_data_ptr()),
                                 capacity};
  if (batch > 0 && kv_heads > 0) Backend::select_pages(params, scores);
  return {pages, counts};
}

}  // namespace lil

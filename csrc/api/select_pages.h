#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <tuple>

#include "api/checks.h"

namespace lil {

// The pages that sink and recent tokens can touch; both are checked.
inline int64_t forced_pages(const char* op, int64_t page_size, int64_t sink, int64_t recent) {
  LIL_CHECK(sink >= 0 && sink <= INT32_MAX, op, "sink", "at least 0 tokens, at most 2147483647", text(sink));
  LIL_CHECK(recent >= 1 && recent <= INT32_MAX, op, "recent", "at least 1 token, the current one, at most 2147483647",
            text(recent));
  // Recent tokens may begin anywhere in a page, so they touch one page more than they fill.
  return (sink + page_size - 1) / page_size + (recent + page_size - 2) / page_size + 1;
}

// The options, checked, in the name of operator `op`; scores and outputs are the caller's to set. Scores are
// [batch, kv_heads, max_pages]; `like` is on their device.
inline SelectPagesParams select_pages_params(const char* op, const Tensor& like, int64_t batch, int64_t kv_heads,
                                             int64_t max_pages, const Tensor& seq_lens, int64_t page_size,
                                             int64_t budget, int64_t sink, int64_t recent,
                                             const std::optional<Tensor>& protected_lens) {
  check_dense(seq_lens, like, op, "seq_lens", "[batch]", {batch});
  if (protected_lens) check_dense(*protected_lens, like, op, "protected_lens", "[batch]", {batch});
  check_page_size(page_size, op, "page_size");
  const int64_t forced = forced_pages(op, page_size, sink, recent);
  LIL_CHECK(budget / page_size >= forced, op, "budget",
            text("at least ", forced * page_size, " tokens (the ", forced, " pages of ", page_size, " that sink ", sink,
                 " and recent ", recent, " can touch)"),
            text(budget));
  SelectPagesParams params{};
  params.stride_b = kv_heads * max_pages;
  params.stride_h = max_pages;
  params.seq_lens = int32_data(seq_lens);
  params.protected_lens = protected_lens ? int32_data(*protected_lens) : nullptr;
  params.batch = batch;
  params.kv_heads = kv_heads;
  params.max_pages = max_pages;
  params.page_size = page_size;
  params.budget_pages = budget / page_size;
  params.sink = sink;
  params.recent = recent;
  params.capacity = std::min(params.budget_pages, max_pages);
  return params;
}

// Allocates what select_pages writes.
inline std::tuple<Tensor, Tensor> select_pages_outputs(SelectPagesParams& params, const Tensor& like) {
  Tensor pages = torch::stable::new_empty(like, {params.batch, params.kv_heads, params.capacity}, ScalarType::Int);
  Tensor counts = torch::stable::new_empty(like, {params.batch, params.kv_heads}, ScalarType::Int);
  params.pages = static_cast<int32_t*>(pages.mutable_data_ptr());
  params.counts = static_cast<int32_t*>(counts.mutable_data_ptr());
  return {pages, counts};
}

template <class Backend>
std::tuple<Tensor, Tensor> select_pages(const Tensor& scores, const Tensor& seq_lens, int64_t page_size, int64_t budget,
                                        int64_t sink, int64_t recent, const std::optional<Tensor>& protected_lens) {
  const char* op = "select_pages";
  check_shape(scores, op, "scores", "[batch, kv_heads, max_pages]", {-1, -1, -1});
  check_dtype(scores, op, "scores", ScalarType::Float);
  check_last_contiguous(scores, op, "scores");
  check_page_size(page_size, op, "page_size");
  check_max_pages(scores.size(2), page_size, op, "scores");
  SelectPagesParams params = select_pages_params(op, scores, scores.size(0), scores.size(1), scores.size(2), seq_lens,
                                                 page_size, budget, sink, recent, protected_lens);
  params.scores = static_cast<const float*>(scores.const_data_ptr());
  params.stride_b = scores.stride(0);
  params.stride_h = scores.stride(1);
  const auto outputs = select_pages_outputs(params, scores);
  if (params.batch > 0 && params.kv_heads > 0) Backend::select_pages(params, scores);
  return outputs;
}

}  // namespace lil

#pragma once

#include <torch/csrc/stable/ops.h>

#include "api/append_kv.h"
#include "api/checks.h"
#include "api/name.h"

namespace lil {

// The arguments, checked, in the name of operator `op`; `scores` is the caller's to set.
template <class Backend>
ScorePagesParams score_pages_params(const char* op, const Tensor& q, const Tensor& summary, const Tensor& page_table,
                                    const Tensor& seq_lens, int64_t page_size, std::optional<double> scale,
                                    SummaryMode mode, const std::optional<Tensor>& k_scale) {
  check_shape(q, op, "q", "[batch, q_heads, head_dim]", {-1, -1, -1});
  const int64_t batch = q.size(0), q_heads = q.size(1), head_dim = q.size(2);
  const DType q_dtype = check_float_dtype(q, op, "q");
  check_head_dim(head_dim, op, "q");
  check_last_contiguous(q, op, "q");
  check_aligned(q, op, "q", Backend::kAlignment);
  const Summary summaries = make_summary(summary, q, op, -1, -1, head_dim, mode);
  const int64_t num_pages = summary.size(0), kv_heads = summary.size(1);
  LIL_CHECK(kv_heads > 0 && q_heads > 0 && q_heads % kv_heads == 0, op, "q",
            text("q_heads a multiple of kv_heads = ", kv_heads), text(q_heads));
  check_aligned(summary, op, "summary", Backend::kAlignment);
  check_page_size(page_size, op, "page_size");
  check_dense(seq_lens, q, op, "seq_lens", "[batch]", {batch});

  ScorePagesParams params{};
  params.q = q.const_data_ptr();
  params.q_stride_b = q.stride(0);
  params.q_stride_h = q.stride(1);
  params.q_dtype = q_dtype;
  params.summary = summaries;
  params.k_scale = make_scale(k_scale, summary, op, "k_scale", num_pages, kv_heads);
  params.num_pages = num_pages;
  params.pages = make_page_table(page_table, q, op, batch, kv_heads, page_size);
  params.seq_lens = int32_data(seq_lens);
  params.batch = batch;
  params.kv_heads = kv_heads;
  params.group = q_heads / kv_heads;
  params.head_dim = head_dim;
  params.page_size = page_size;
  params.scale = checked_scale(scale, head_dim, op);
  LIL_CHECK(params.scale > 0, op, "scale", "a positive number (the bound holds for no other)", text(*scale));
  return params;
}

template <class Backend>
Tensor score_pages(const Tensor& q, const Tensor& summary, const Tensor& page_table, const Tensor& seq_lens,
                   int64_t page_size, std::optional<double> scale, const Name& mode,
                   const std::optional<Tensor>& k_scale) {
  const char* op = "score_pages";
  ScorePagesParams params = score_pages_params<Backend>(op, q, summary, page_table, seq_lens, page_size, scale,
                                                        check_read_summary(mode, op), k_scale);
  Tensor scores =
      torch::stable::new_empty(q, {params.batch, params.kv_heads, params.pages.max_pages}, ScalarType::Float);
  params.scores = static_cast<float*>(scores.mutable_data_ptr());
  if (params.batch > 0) Backend::score_pages(params, q);
  return scores;
}

}  // namespace lil

#pragma once

#include <torch/csrc/stable/ops.h>

#include "api/checks.h"

namespace lil {

template <class Backend>
Tensor information_loss(const Tensor& lse, const Tensor& scores, const Tensor& seq_lens, int64_t page_size,
                        const Tensor& pages, const std::optional<Tensor>& counts, double softcap) {
  const char* op = "information_loss";
  check_shape(scores, op, "scores", "[batch, kv_heads, max_pages]", {-1, -1, -1});
  check_dtype(scores, op, "scores", ScalarType::Float);
  check_last_contiguous(scores, op, "scores");
  const int64_t batch = scores.size(0), kv_heads = scores.size(1);
  check_shape(lse, op, "lse", "[batch, q_heads]", {batch, -1});
  check_dense(lse, scores, op, "lse", "[batch, q_heads]", {batch, lse.size(1)}, ScalarType::Float);
  LIL_CHECK(kv_heads > 0 && lse.size(1) % kv_heads == 0, op, "lse", text("q_heads a multiple of kv_heads = ", kv_heads),
            text(lse.size(1)));
  check_dense(seq_lens, scores, op, "seq_lens", "[batch]", {batch});
  check_page_size(page_size, op, "page_size");
  check_max_pages(scores.size(2), page_size, op, "scores");
  const PageLists lists = make_page_lists(pages, counts, scores, op, batch, kv_heads);
  const float cap = checked_softcap(softcap, op);
  Tensor loss = torch::stable::new_empty(scores, {batch, lse.size(1)}, ScalarType::Float);
  const InformationLossParams params{static_cast<const float*>(lse.const_data_ptr()),
                                     static_cast<const float*>(scores.const_data_ptr()),
                                     scores.stride(0),
                                     scores.stride(1),
                                     int32_data(seq_lens),
                                     lists.pages,
                                     lists.stride_b,
                                     lists.stride_h,
                                     lists.counts,
                                     lists.capacity,
                                     batch,
                                     kv_heads,
                                     lse.size(1) / kv_heads,
                                     scores.size(2),
                                     page_size,
                                     cap,
                                     static_cast<float*>(loss.mutable_data_ptr())};
  if (batch > 0 && params.group > 0) Backend::information_loss(params, scores);
  return loss;
}

}  // namespace lil

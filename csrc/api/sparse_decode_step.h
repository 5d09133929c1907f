#pragma once

#include <tuple>

#include "api/append_kv.h"
#include "api/information_loss.h"
#include "api/name.h"
#include "api/score_pages.h"
#include "api/select_pages.h"
#include "api/sparse_decode.h"

namespace lil {

// `attend` over the pages that `select` wrote.
inline SparseDecodeParams with_selection(SparseDecodeParams attend, const SelectPagesParams& select) {
  attend.selected = true;
  attend.pages = select.pages;
  attend.pages_stride_b = select.kv_heads * select.capacity;
  attend.pages_stride_h = select.capacity;
  attend.counts = select.counts;
  attend.capacity = select.capacity;
  return attend;
}

// The loss of a step whose pages `select` wrote.
inline InformationLossParams information_loss_of(const SparseDecodeStepParams& step, const SelectPagesParams& select) {
  InformationLossParams params{};
  params.lse = step.attend.lse;
  params.scores = select.scores;
  params.stride_b = select.stride_b;
  params.stride_h = select.stride_h;
  params.seq_lens = select.seq_lens;
  params.pages = select.pages;
  params.pages_stride_b = select.kv_heads * select.capacity;
  params.pages_stride_h = select.capacity;
  params.counts = select.counts;
  params.capacity = select.capacity;
  params.batch = select.batch;
  params.kv_heads = select.kv_heads;
  params.group = step.attend.group;
  params.max_pages = select.max_pages;
  params.page_size = select.page_size;
  params.softcap = step.attend.softcap;
  params.loss = step.loss;
  return params;
}

template <class Backend>
std::tuple<Tensor, Tensor> sparse_decode_step(const Tensor& q, const Tensor& k, const Tensor& v, Tensor k_cache,
                                              Tensor v_cache, Tensor summary, const Tensor& page_table,
                                              const Tensor& seq_lens, int64_t budget, int64_t sink, int64_t recent,
                                              const std::optional<Tensor>& protected_lens, std::optional<double> scale,
                                              double softcap, const Name& mode, const std::optional<Tensor>& k_scale,
                                              const std::optional<Tensor>& v_scale, std::optional<Tensor> loss) {
  const char* op = "sparse_decode_step";
  std::optional<Tensor> summaries = summary;
  SparseDecodeStepParams params{};
  params.attend = sparse_decode_params<Backend>(op, q, k_cache, v_cache, page_table, seq_lens, std::nullopt,
                                                std::nullopt, scale, 0, softcap, k_scale, v_scale);
  const KvCache& cache = params.attend.cache;
  const int64_t batch = params.attend.batch, max_pages = params.attend.table.max_pages;
  params.select = select_pages_params(op, q, batch, cache.kv_heads, max_pages, seq_lens, cache.page_size, budget, sink,
                                      recent, protected_lens);
  params.score = score_pages_params<Backend>(op, q, summary, page_table, seq_lens, cache.page_size, scale,
                                             check_made_summary(mode, op), k_scale);
  if (loss) check_dense(*loss, q, op, "loss", "[batch, q_heads]", {batch, q.size(1)}, ScalarType::Float);
  params.append = append_kv_params<Backend>(op, k_cache, v_cache, summaries, k, v, page_table, seq_lens, std::nullopt,
                                            mode, k_scale, v_scale);
  params.loss = loss ? static_cast<float*>(loss->mutable_data_ptr()) : nullptr;
  params.attend.cache = params.append.cache;
  params.score.summary = params.append.summary;
  Tensor scores = torch::stable::new_empty(q, {batch, cache.kv_heads, max_pages}, ScalarType::Float);
  params.score.scores = static_cast<float*>(scores.mutable_data_ptr());
  params.select.scores = params.score.scores;
  const auto outputs = sparse_decode_outputs(params.attend, q);
  if (batch > 0 && params.attend.group > 0) Backend::sparse_decode_step(params, q);
  return outputs;
}

}  // namespace lil

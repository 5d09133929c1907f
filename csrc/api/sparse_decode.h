#pragma once

#include <torch/csrc/stable/ops.h>

#include <tuple>

#include "api/checks.h"

namespace lil {

// The arguments, checked, in the name of operator `op`; `out` and `lse` are the caller's to set.
template <class Backend>
SparseDecodeParams sparse_decode_params(const char* op, const Tensor& q, const Tensor& k_cache, const Tensor& v_cache,
                                        const Tensor& page_table, const Tensor& seq_lens,
                                        const std::optional<Tensor>& pages, const std::optional<Tensor>& counts,
                                        std::optional<double> scale, int64_t window, double softcap,
                                        const std::optional<Tensor>& k_scale, const std::optional<Tensor>& v_scale) {
  const KvCache cache = make_kv_cache(k_cache, v_cache, k_scale, v_scale, op);
  check_shape(q, op, "q", "[batch, q_heads, head_dim]", {-1, -1, cache.head_dim});
  const int64_t batch = q.size(0), q_heads = q.size(1);
  const DType q_dtype = check_float_dtype(q, op, "q");
  check_device(q, k_cache, op, "q");
  check_last_contiguous(q, op, "q");
  check_aligned(q, op, "q", Backend::kAlignment);
  check_aligned(k_cache, op, "k_cache", Backend::kAlignment);
  check_aligned(v_cache, op, "v_cache", Backend::kAlignment);
  LIL_CHECK(cache.kv_heads > 0 && q_heads % cache.kv_heads == 0, op, "q",
            text("q_heads a multiple of kv_heads = ", cache.kv_heads), text(q_heads));
  check_dense(seq_lens, q, op, "seq_lens", "[batch]", {batch});
  LIL_CHECK(pages || !counts, op, "counts", "None where pages is None", shape_text(*counts));
  PageLists lists{};
  if (pages) lists = make_page_lists(*pages, counts, q, op, batch, cache.kv_heads);
  LIL_CHECK(window >= 0, op, "window", "at least 0 tokens (0: no window)", text(window));

  SparseDecodeParams params{};
  params.q = q.const_data_ptr();
  params.q_stride_b = q.stride(0);
  params.q_stride_h = q.stride(1);
  params.q_dtype = q_dtype;
  params.cache = cache;
  params.table = make_page_table(page_table, q, op, batch, cache.kv_heads, cache.page_size);
  check_max_pages(lists.capacity, cache.page_size, op, "pages");
  params.seq_lens = int32_data(seq_lens);
  params.selected = pages.has_value();
  params.pages = lists.pages;
  params.pages_stride_b = lists.stride_b;
  params.pages_stride_h = lists.stride_h;
  params.counts = lists.counts;
  params.capacity = lists.capacity;
  params.batch = batch;
  params.group = q_heads / cache.kv_heads;
  params.scale = checked_scale(scale, cache.head_dim, op);
  params.window = window;
  params.softcap = checked_softcap(softcap, op);
  return params;
}

// Allocates what sparse_decode writes.
inline std::tuple<Tensor, Tensor> sparse_decode_outputs(SparseDecodeParams& params, const Tensor& q) {
  Tensor out = torch::stable::new_empty(q, {q.size(0), q.size(1), q.size(2)});
  Tensor lse = torch::stable::new_empty(q, {q.size(0), q.size(1)}, ScalarType::Float);
  params.out = out.mutable_data_ptr();
  params.lse = static_cast<float*>(lse.mutable_data_ptr());
  return {out, lse};
}

// Where an optional output of `width` numbers a query head goes; null where it is not asked for.
inline float* mass_output(std::optional<Tensor>& t, const Tensor& q, const char* op, const char* arg,
                          const char* meaning, int64_t width) {
  if (!t) return nullptr;
  check_dense(*t, q, op, arg, meaning, {q.size(0), q.size(1), width}, ScalarType::Float);
  return static_cast<float*>(t->mutable_data_ptr());
}

template <class Backend>
std::tuple<Tensor, Tensor> sparse_decode(const Tensor& q, const Tensor& k_cache, const Tensor& v_cache,
                                         const Tensor& page_table, const Tensor& seq_lens,
                                         const std::optional<Tensor>& pages, const std::optional<Tensor>& counts,
                                         std::optional<double> scale, int64_t window, double softcap,
                                         const std::optional<Tensor>& k_scale, const std::optional<Tensor>& v_scale,
                                         std::optional<Tensor> page_mass, std::optional<Tensor> token_mass) {
  const char* op = "sparse_decode";
  SparseDecodeParams params = sparse_decode_params<Backend>(op, q, k_cache, v_cache, page_table, seq_lens, pages,
                                                            counts, scale, window, softcap, k_scale, v_scale);
  const int64_t entries = params.entries_capacity();
  params.page_mass = mass_output(page_mass, q, op, "page_mass", "[batch, q_heads, capacity]", entries);
  params.token_mass = mass_output(token_mass, q, op, "token_mass", "[batch, q_heads, capacity * page_size]",
                                  entries * params.cache.page_size);
  const auto outputs = sparse_decode_outputs(params, q);
  if (params.batch > 0 && params.group > 0) Backend::sparse_decode(params, q);
  return outputs;
}

}  // namespace lil

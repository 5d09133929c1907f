#pragma once

#include <torch/csrc/stable/ops.h>

#include <cmath>
#include <tuple>

#include "api/checks.h"

namespace lil {

template <class Backend>
std::tuple<Tensor, Tensor> sparse_decode(const Tensor& q, const Tensor& k_cache, const Tensor& v_cache,
                                         const Tensor& page_table, const Tensor& seq_lens,
                                         const std::optional<Tensor>& pages, const std::optional<Tensor>& counts,
                                         std::optional<double> scale, int64_t window, double softcap) {
  const char* op = "sparse_decode";
  const KvCache cache = make_kv_cache(k_cache, v_cache, op);
  check_shape(q, op, "q", "[batch, q_heads, head_dim]", {-1, -1, cache.head_dim});
  const int64_t batch = q.size(0), q_heads = q.size(1);
  const DType q_dtype = check_float_dtype(q, op, "q");
  check_device(q, k_cache, op, "q");
  check_last_contiguous(q, op, "q");
  LIL_CHECK(cache.kv_heads > 0 && q_heads % cache.kv_heads == 0, op, "q",
            text("q_heads a multiple of kv_heads = ", cache.kv_heads), text(q_heads));
  check_dense(seq_lens, q, op, "seq_lens", "[batch]", {batch});
  if (pages) {
    check_device(*pages, q, op, "pages");
    check_dtype(*pages, op, "pages", ScalarType::Int);
    check_shape(*pages, op, "pages", "[batch, kv_heads, capacity]", {batch, cache.kv_heads, -1});
    check_last_contiguous(*pages, op, "pages");
  }
  if (counts) {
    LIL_CHECK(pages.has_value(), op, "counts", "None where pages is None", shape_text(*counts));
    check_dense(*counts, q, op, "counts", "[batch, kv_heads]", {batch, cache.kv_heads});
  }
  LIL_CHECK(window >= 0, op, "window", "at least 0 tokens (0: no window)", text(window));
  LIL_CHECK(softcap >= 0, op, "softcap", "at least 0 (0: none)", text(softcap));

  SparseDecodeParams params{};
  params.q = q.const_data_ptr();
  params.q_stride_b = q.stride(0);
  params.q_stride_h = q.stride(1);
  params.q_dtype = q_dtype;
  params.cache = cache;
  params.table = make_page_table(page_table, q, op, batch, cache.kv_heads);
  params.seq_lens = int32_data(seq_lens);
  params.selected = pages.has_value();
  if (pages) {
    params.pages = int32_data(*pages);
    params.pages_stride_b = pages->stride(0);
    params.pages_stride_h = pages->stride(1);
    params.counts = counts ? int32_data(*counts) : nullptr;
    params.capacity = pages->size(2);
  }
  params.batch = batch;
  params.group = q_heads / cache.kv_heads;
  params.scale = static_cast<float>(scale.value_or(1.0 / std::sqrt(static_cast<double>(cache.head_dim))));
  params.window = window;
  params.softcap = static_cast<float>(softcap);
  Tensor out = torch::stable::new_empty(q, {batch, q_heads, cache.head_dim});
  Tensor lse = torch::stable::new_empty(q, {batch, q_heads}, ScalarType::Float);
  params.out = out.mutable_data_ptr();
  params.lse = static_cast<float*>(lse.mutable_data_ptr());
  if (batch > 0 && q_heads > 0) Backend::sparse_decode(params, q);
  return {out, lse};
}

}  // namespace lil

#pragma once

#include "api/checks.h"
#include "api/name.h"

namespace lil {

// The arguments, checked, in the name of operator `op`.
template <class Backend>
AppendKvParams append_kv_params(const char* op, Tensor& k_cache, Tensor& v_cache, std::optional<Tensor>& summary,
                                const Tensor& k, const Tensor& v, const Tensor& page_table, const Tensor& seq_lens,
                                const std::optional<Tensor>& cu_seqlens, const std::string& mode,
                                const std::optional<Tensor>& k_scale, const std::optional<Tensor>& v_scale,
                                const std::optional<Tensor>& slots = std::nullopt) {
  KvCache cache = make_kv_cache(k_cache, v_cache, k_scale, v_scale, op);
  const SummaryMode summary_mode = check_made_summary(mode, op);
  Summary pages{};
  pages.dtype = cache.dtype;
  if (summary) {
    const ScalarType stored = k_cache.scalar_type();
    LIL_CHECK(summary->scalar_type() == stored || is_float8(*summary), op, "summary",
              text(is_float8(k_cache) ? "" : text(torch::headeronly::toString(stored), " or "), "Float8_e4m3fn"),
              torch::headeronly::toString(summary->scalar_type()));
    pages = make_summary(*summary, k_cache, op, cache.num_pages, cache.kv_heads, cache.head_dim, summary_mode);
    check_aligned(*summary, op, "summary", Backend::kAlignment);
  }
  const char* meaning = "[tokens, kv_heads, head_dim]";
  check_shape(seq_lens, op, "seq_lens", "[batch]", {-1});
  const int64_t batch = seq_lens.size(0);
  check_dense(seq_lens, k_cache, op, "seq_lens", "[batch]", {batch});
  if (cu_seqlens) check_dense(*cu_seqlens, k_cache, op, "cu_seqlens", "[batch + 1]", {batch + 1});
  if (slots) {
    LIL_CHECK(!cu_seqlens, op, "slots", "None beside cu_seqlens", shape_text(*slots));
    check_dense(*slots, k_cache, op, "slots", "[batch, kv_heads]", {batch, cache.kv_heads});
  }
  check_shape(k, op, "k", meaning, {cu_seqlens ? -1 : batch, cache.kv_heads, cache.head_dim});
  check_shape(v, op, "v", meaning, {k.size(0), cache.kv_heads, cache.head_dim});
  // What is stored as float8 comes in a wider dtype.
  const bool narrows = cache.dtype == DType::kFloat8E4M3;
  const DType k_dtype = narrows ? check_float_dtype(k, op, "k") : cache.dtype;
  const ScalarType dtype = narrows ? k.scalar_type() : k_cache.scalar_type();
  for (const auto& [t, arg] : {std::pair{&k, "k"}, std::pair{&v, "v"}}) {
    check_device(*t, k_cache, op, arg);
    check_dtype(*t, op, arg, dtype);
    check_last_contiguous(*t, op, arg);
    check_aligned(*t, op, arg, Backend::kAlignment);
  }
  check_aligned(k_cache, op, "k_cache", Backend::kAlignment);
  check_aligned(v_cache, op, "v_cache", Backend::kAlignment);
  const PageTable table = make_page_table(page_table, k_cache, op, batch, cache.kv_heads, cache.page_size);
  // What is written is asked for as such: a copy-on-write tensor gets its copy here.
  cache.k.data = k_cache.mutable_data_ptr();
  cache.v.data = v_cache.mutable_data_ptr();
  if (summary) pages.data = summary->mutable_data_ptr();
  return {cache,
          pages,
          k.const_data_ptr(),
          v.const_data_ptr(),
          k_dtype,
          k.stride(0),
          k.stride(1),
          v.stride(0),
          v.stride(1),
          table,
          int32_data(seq_lens),
          cu_seqlens ? int32_data(*cu_seqlens) : nullptr,
          batch,
          k.size(0),
          slots ? int32_data(*slots) : nullptr};
}

template <class Backend>
void append_kv(Tensor k_cache, Tensor v_cache, std::optional<Tensor> summary, const Tensor& k, const Tensor& v,
               const Tensor& page_table, const Tensor& seq_lens, const std::optional<Tensor>& cu_seqlens,
               const Name& mode, const std::optional<Tensor>& k_scale, const std::optional<Tensor>& v_scale,
               const std::optional<Tensor>& slots) {
  const AppendKvParams params = append_kv_params<Backend>("append_kv", k_cache, v_cache, summary, k, v, page_table,
                                                          seq_lens, cu_seqlens, mode, k_scale, v_scale, slots);
  if (params.batch > 0) Backend::append_kv(params, k_cache);
}

}  // namespace lil

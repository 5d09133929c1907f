#pragma once

#include "api/checks.h"

namespace lil {

inline void check_summary_mode(const std::string& mode, const char* op) {
  LIL_CHECK(mode == "minmax", op, "summary_mode", "'minmax'", "'" + mode + "'");
}

template <class Backend>
void append_kv(Tensor k_cache, Tensor v_cache, std::optional<Tensor> summary, const Tensor& k, const Tensor& v,
               const Tensor& page_table, const Tensor& seq_lens, const std::optional<Tensor>& cu_seqlens,
               const std::string& mode) {
  const char* op = "append_kv";
  const KvCache cache = make_kv_cache(k_cache, v_cache, op);
  check_summary_mode(mode, op);
  const Summary pages = summary ? make_summary(*summary, k_cache, op, cache.num_pages, cache.kv_heads, cache.head_dim,
                                               k_cache.scalar_type())
                                : Summary{};
  const char* meaning = "[tokens, kv_heads, head_dim]";
  check_shape(seq_lens, op, "seq_lens", "[batch]", {-1});
  const int64_t batch = seq_lens.size(0);
  check_dense(seq_lens, k_cache, op, "seq_lens", "[batch]", {batch});
  if (cu_seqlens) check_dense(*cu_seqlens, k_cache, op, "cu_seqlens", "[batch + 1]", {batch + 1});
  check_shape(k, op, "k", meaning, {cu_seqlens ? -1 : batch, cache.kv_heads, cache.head_dim});
  check_shape(v, op, "v", meaning, {k.size(0), cache.kv_heads, cache.head_dim});
  for (const auto& [t, arg] : {std::pair{&k, "k"}, std::pair{&v, "v"}}) {
    check_device(*t, k_cache, op, arg);
    check_dtype(*t, op, arg, k_cache.scalar_type());
    check_last_contiguous(*t, op, arg);
  }
  const AppendKvParams params{cache,
                              pages,
                              k.const_data_ptr(),
                              v.const_data_ptr(),
                              k.stride(0),
                              k.stride(1),
                              v.stride(0),
                              v.stride(1),
                              make_page_table(page_table, k_cache, op, batch, cache.kv_heads),
                              int32_data(seq_lens),
                              cu_seqlens ? int32_data(*cu_seqlens) : nullptr,
                              batch,
                              k.size(0)};
  if (batch > 0) Backend::append_kv(params, k_cache);
}

}  // namespace lil

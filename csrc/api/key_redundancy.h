#pragma once

#include <torch/csrc/stable/ops.h>

#include "api/checks.h"

namespace lil {

template <class Backend>
Tensor key_redundancy(const Tensor& k_cache, const Tensor& page_table, const Tensor& seq_lens, double threshold,
                      const std::optional<Tensor>& positions) {
  const char* op = "key_redundancy";
  const KvCache cache = make_kv_cache(k_cache, k_cache, std::nullopt, std::nullopt, op);  // values are not looked at
  check_aligned(k_cache, op, "k_cache", Backend::kAlignment);
  check_shape(seq_lens, op, "seq_lens", "[batch]", {-1});
  const int64_t batch = seq_lens.size(0);
  check_dense(seq_lens, k_cache, op, "seq_lens", "[batch]", {batch});
  const PageTable table = make_page_table(page_table, k_cache, op, batch, cache.kv_heads, cache.page_size);
  LIL_CHECK(threshold >= -1 && threshold <= 1, op, "threshold", "a cosine, -1 to 1", text(threshold));
  if (positions) {
    check_device(*positions, k_cache, op, "positions");
    check_dtype(*positions, op, "positions", ScalarType::Int);
    check_shape(*positions, op, "positions", "[batch, kv_heads, capacity]", {batch, cache.kv_heads, -1});
    check_last_contiguous(*positions, op, "positions");
  }
  const int64_t slots = table.max_pages * cache.page_size;
  Tensor redundancy = torch::stable::new_empty(k_cache, {batch, cache.kv_heads, slots}, ScalarType::Float);
  const KeyRedundancyParams params{cache,
                                   table,
                                   int32_data(seq_lens),
                                   positions ? int32_data(*positions) : nullptr,
                                   positions ? positions->stride(0) : 0,
                                   positions ? positions->stride(1) : 0,
                                   positions ? positions->size(2) : slots,
                                   batch,
                                   slots,
                                   static_cast<float>(threshold),
                                   static_cast<float*>(redundancy.mutable_data_ptr())};
  if (batch > 0 && cache.kv_heads > 0 && slots > 0) Backend::key_redundancy(params, k_cache);
  return redundancy;
}

}  // namespace lil

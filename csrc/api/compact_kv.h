#pragma once

#include "api/checks.h"

namespace lil {

template <class Backend>
void compact_kv(Tensor k_cache, Tensor v_cache, const Tensor& page_table, const Tensor& keep, const Tensor& counts) {
  const char* op = "compact_kv";
  KvCache cache = make_kv_cache(k_cache, v_cache, std::nullopt, std::nullopt, op);
  check_aligned(k_cache, op, "k_cache", Backend::kAlignment);
  check_aligned(v_cache, op, "v_cache", Backend::kAlignment);
  check_shape(keep, op, "keep", "[batch, kv_heads, capacity]", {-1, cache.kv_heads, -1});
  check_device(keep, k_cache, op, "keep");
  check_dtype(keep, op, "keep", ScalarType::Int);
  check_last_contiguous(keep, op, "keep");
  const int64_t batch = keep.size(0);
  check_dense(counts, k_cache, op, "counts", "[batch]", {batch});
  const PageTable table = make_page_table(page_table, k_cache, op, batch, cache.kv_heads, cache.page_size);
  cache.k.data = k_cache.mutable_data_ptr();
  cache.v.data = v_cache.mutable_data_ptr();
  const CompactKvParams params{cache,
                               static_cast<int64_t>(k_cache.element_size()),
                               table,
                               int32_data(keep),
                               keep.stride(0),
                               keep.stride(1),
                               int32_data(counts),
                               batch,
                               keep.size(2)};
  if (batch > 0 && cache.kv_heads > 0) Backend::compact_kv(params, k_cache);
}

}  // namespace lil

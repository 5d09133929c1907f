#pragma once

#include "api/checks.h"

namespace lil {

template <class Backend>
void represent_page(Tensor summary, Tensor weight, const Tensor& k_cache, const Tensor& page_table,
                    const Tensor& seq_lens, const Tensor& mass, const Tensor& pages,
                    const std::optional<Tensor>& counts, int64_t recent, int64_t representatives) {
  const char* op = "represent_page";
  const KvCache cache = make_kv_cache(k_cache, k_cache, std::nullopt, std::nullopt, op);  // values are not looked at
  check_aligned(k_cache, op, "k_cache", Backend::kAlignment);
  LIL_CHECK(
      summary.scalar_type() == k_cache.scalar_type() || is_float8(summary), op, "summary",
      text(is_float8(k_cache) ? "" : text(torch::headeronly::toString(k_cache.scalar_type()), " or "), "Float8_e4m3fn"),
      torch::headeronly::toString(summary.scalar_type()));
  Summary means =
      make_summary(summary, k_cache, op, cache.num_pages, cache.kv_heads, cache.head_dim, SummaryMode::kRepresentative);
  LIL_CHECK(means.vectors == 1, op, "summary", "one vector, the mean", text(means.vectors));
  check_aligned(summary, op, "summary", Backend::kAlignment);
  check_shape(seq_lens, op, "seq_lens", "[batch]", {-1});
  const int64_t batch = seq_lens.size(0);
  check_dense(seq_lens, k_cache, op, "seq_lens", "[batch]", {batch});
  const PageTable table = make_page_table(page_table, k_cache, op, batch, cache.kv_heads, cache.page_size);
  const int64_t tokens = table.max_pages * cache.page_size;
  check_dense(weight, k_cache, op, "weight", "[batch, kv_heads, max_pages * page_size]",
              {batch, cache.kv_heads, tokens}, ScalarType::Float);
  const PageLists lists = make_page_lists(pages, counts, k_cache, op, batch, cache.kv_heads);
  check_max_pages(lists.capacity, cache.page_size, op, "pages");
  check_shape(mass, op, "mass", "[batch, q_heads, capacity * page_size]",
              {batch, -1, lists.capacity * cache.page_size});
  check_dense(mass, k_cache, op, "mass", "[batch, q_heads, capacity * page_size]",
              {batch, mass.size(1), lists.capacity * cache.page_size}, ScalarType::Float);
  LIL_CHECK(cache.kv_heads > 0 ? mass.size(1) % cache.kv_heads == 0 : mass.size(1) == 0, op, "mass",
            text("query heads that are a multiple of ", cache.kv_heads), text(mass.size(1)));
  LIL_CHECK(recent >= 1 && recent <= INT32_MAX, op, "recent", "at least 1", text(recent));
  const int64_t most = kMaxRepresentatives < cache.page_size ? kMaxRepresentatives : cache.page_size;
  LIL_CHECK(representatives >= 1 && representatives <= most, op, "representatives", text("1 to ", most),
            text(representatives));
  means.data = summary.mutable_data_ptr();
  const RepresentPageParams params{means,
                                   static_cast<float*>(weight.mutable_data_ptr()),
                                   cache,
                                   table,
                                   int32_data(seq_lens),
                                   static_cast<const float*>(mass.const_data_ptr()),
                                   lists.pages,
                                   lists.stride_b,
                                   lists.stride_h,
                                   lists.counts,
                                   lists.capacity,
                                   batch,
                                   cache.kv_heads > 0 ? mass.size(1) / cache.kv_heads : 0,
                                   recent,
                                   representatives};
  if (batch > 0 && cache.kv_heads > 0 && table.max_pages > 0) Backend::represent_page(params, k_cache);
}

}  // namespace lil

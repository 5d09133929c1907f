#include "cpu/kernels/dot.h"
#include "cpu/kernels/table.h"

namespace lil::cpu::LIL_ISA {
namespace {

// The summary is computed anew from all tokens of the page, never merged with what was there: so a page's summary is
// right after a slot was overwritten or a sequence cut short, and the first token of a page is no special case.
template <class T>
void summarise(const T* keys, int64_t stride_token, int64_t tokens, int64_t head_dim, T* summary) {
  for (int64_t d = 0; d < head_dim; d += Vec::N) {
    Vec low = Vec::load(keys + d), high = low;
    for (int64_t t = 1; t < tokens; ++t) {
      const Vec key = Vec::load(keys + t * stride_token + d);
      low = Vec::min(low, key);
      high = Vec::max(high, key);
    }
    low.store(summary + d);
    high.store(summary + head_dim + d);
  }
}

template <class T>
void append_page(const AppendKvParams& p, const AppendItem& item, int64_t h) {
  const int64_t physical = p.pages.at(item.b, h, item.page), row_bytes = p.cache.head_dim * sizeof(T);
  const auto at = [&](const PagedBuffer& buffer) {
    return static_cast<T*>(buffer.data) + physical * buffer.stride_page + h * buffer.stride_head;
  };
  T *k_page = at(p.cache.k), *v_page = at(p.cache.v);
  const T* k = static_cast<const T*>(p.k) + item.first_token * p.k_stride_token + h * p.k_stride_head;
  const T* v = static_cast<const T*>(p.v) + item.first_token * p.v_stride_token + h * p.v_stride_head;
  for (int64_t slot = item.begin; slot < item.end; ++slot) {
    memcpy(k_page + slot * p.cache.k.stride_token, k, row_bytes);
    memcpy(v_page + slot * p.cache.v.stride_token, v, row_bytes);
    k += p.k_stride_token;
    v += p.v_stride_token;
  }
  if (p.summary.data) {
    T* summary = static_cast<T*>(p.summary.data) + physical * p.summary.stride_page + h * p.summary.stride_head;
    summarise(k_page, p.cache.k.stride_token, item.tokens_in_page, p.cache.head_dim, summary);
  }
}

}  // namespace

void append_kv(const AppendKvParams& p, const AppendItem* items, int64_t begin, int64_t end) {
  with_dtype(p.cache.dtype, [&]<class T>(const T*) {
    for (int64_t i = begin; i < end; ++i) append_page<T>(p, items[i / p.cache.kv_heads], i % p.cache.kv_heads);
  });
}

}  // namespace lil::cpu::LIL_ISA

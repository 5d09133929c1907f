#include "cpu/kernels/dot.h"
#include "cpu/kernels/table.h"

namespace lil::cpu::LIL_ISA {
namespace {

// x rounded down (side -1) or up (side 1) to float8: to nearest first, and what came out on the wrong side goes one
// value on, which beyond +-448 is NaN.
void store_bound(Vec x, int side, e4m3* p) {
  x.store(p);
  float want[Vec::N], got[Vec::N];
  int32_t step[Vec::N];
  x.store(want);
  Vec::load(p).store(got);
  for (int i = 0; i < Vec::N; ++i) step[i] = side > 0 ? got[i] < want[i] : got[i] > want[i];
  for (int i = 0; i < Vec::N; ++i) {
    const int32_t bits = p[i].bits, away = 1 - (bits >> 6 & 2);
    p[i].bits = static_cast<uint8_t>(bits + step[i] * away * side);
  }
}

// The summary is computed anew from all tokens of the page, never merged with what was there: so a page's summary is
// right after a slot was overwritten or a sequence cut short, and the first token of a page is no special case.
template <class T, class S>
void summarise_minmax(const T* keys, int64_t stride_token, int64_t tokens, int64_t head_dim, S* summary) {
  for (int64_t d = 0; d < head_dim; d += Vec::N) {
    Vec low = Vec::load(keys + d), high = low;
    for (int64_t t = 1; t < tokens; ++t) {
      const Vec key = Vec::load(keys + t * stride_token + d);
      low = Vec::min(low, key);
      high = Vec::max(high, key);
    }
    if constexpr (sizeof(S) < sizeof(T)) {
      store_bound(low, -1, summary + d);
      store_bound(high, 1, summary + head_dim + d);
    } else {
      low.store(summary + d);
      high.store(summary + head_dim + d);
    }
  }
}

// Relative to the first key: far from zero nothing cancels, and equal keys have a deviation of 0.
template <class T, class S>
void summarise_meanstd(const T* keys, int64_t stride_token, int64_t tokens, int64_t head_dim, S* summary) {
  const Vec count = Vec::set1(static_cast<float>(tokens));
  for (int64_t d = 0; d < head_dim; d += Vec::N) {
    const Vec base = Vec::load(keys + d);
    Vec sum = Vec::zero(), squares = Vec::zero();
    for (int64_t t = 1; t < tokens; ++t) sum = sum + (Vec::load(keys + t * stride_token + d) - base);
    const Vec mean = sum / count;
    for (int64_t t = 0; t < tokens; ++t) {
      const Vec deviation = Vec::load(keys + t * stride_token + d) - base - mean;
      squares = Vec::fma(deviation, deviation, squares);
    }
    (base + mean).store(summary + d);
    Vec::sqrt(squares / count).store(summary + head_dim + d);
  }
}

template <class T>
void store_row(const T* row, int64_t head_dim, float, T* out) {
  memcpy(out, row, head_dim * sizeof(T));
}

template <class S>
void store_row(const S* row, int64_t head_dim, float scale, e4m3* out) {
  for (int64_t d = 0; d < head_dim; d += Vec::N) (Vec::load(row + d) / Vec::set1(scale)).store(out + d);
}

// T is what the cache stores, U what its summaries are, S what comes.
template <class T, class U, class S>
void append_page(const AppendKvParams& p, const AppendItem& item) {
  const int64_t h = item.h, physical = p.pages.at(item.b, h, item.page), head_dim = p.cache.head_dim;
  const auto at = [&](const PagedBuffer& buffer) {
    return static_cast<T*>(buffer.data) + physical * buffer.stride_page + h * buffer.stride_head;
  };
  T *k_page = at(p.cache.k), *v_page = at(p.cache.v);
  const S* k = static_cast<const S*>(p.k) + item.first_token * p.k_stride_token + h * p.k_stride_head;
  const S* v = static_cast<const S*>(p.v) + item.first_token * p.v_stride_token + h * p.v_stride_head;
  const float k_scale = p.cache.k_scale.at(physical, h), v_scale = p.cache.v_scale.at(physical, h);
  for (int64_t slot = item.begin; slot < item.end; ++slot) {
    store_row(k, head_dim, k_scale, k_page + slot * p.cache.k.stride_token);
    store_row(v, head_dim, v_scale, v_page + slot * p.cache.v.stride_token);
    k += p.k_stride_token;
    v += p.v_stride_token;
  }
  if (p.summary.data) {
    U* summary = static_cast<U*>(p.summary.data) + physical * p.summary.stride_page + h * p.summary.stride_head;
    const auto summarise = p.summary.mode == SummaryMode::kMeanStd ? summarise_meanstd<T, U> : summarise_minmax<T, U>;
    summarise(k_page, p.cache.k.stride_token, item.tokens_in_page, head_dim, summary);
  }
}

}  // namespace

void append_kv(const AppendKvParams& p, const AppendItem* items, int64_t begin, int64_t end) {
  const auto append = [&](auto append_one) {
    for (int64_t i = begin; i < end; ++i) append_one(p, items[i]);
  };
  if (p.cache.dtype == DType::kFloat8E4M3) {
    with_dtype(p.k_dtype, [&]<class S>(const S*) { append(append_page<e4m3, e4m3, S>); });
  } else {
    with_dtype(p.cache.dtype, [&]<class T>(const T*) {
      p.summary.dtype == DType::kFloat8E4M3 ? append(append_page<T, e4m3, T>) : append(append_page<T, T, T>);
    });
  }
}

}  // namespace lil::cpu::LIL_ISA

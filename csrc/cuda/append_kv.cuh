// One warp appends one token of one KV head. The token that closes a page (its last slot, or the sequence's last token)
// also renews the page's summary: from the cache for slots that were there, from k for those that this call adds, so no
// warp waits for another's writes.
#pragma once

#include "cuda/numbers.cuh"
#include "cuda/pages.cuh"

namespace lil::cuda {

// Tokens [first, last) of k and v are sequence b's; `row` is one of them.
template <class T>
__device__ void append_token(const AppendKvParams& p, int32_t row, int32_t b, int32_t h, int32_t first, int32_t last,
                             Finding& finding) {
  constexpr int kPerVector = 16 / sizeof(T);
  const PageSize page_size(p.cache.page_size);
  const int32_t length = checked_length(finding, p.seq_lens, b, p.pages.max_pages << page_size.shift);
  if (finding.wrong != Wrong::kNothing) return;
  finding.note(last - first > length, Wrong::kSeqLensShort, length, last - first);
  if (last - first > length) return;
  const int32_t start = length - (last - first), position = start + row - first;
  const int32_t slot = page_size.slot(position);
  const int64_t physical = checked_page(finding, p.pages, b, h, page_size.page(position), p.cache.num_pages);
  finding.note(physical < 0, Wrong::kPageTable, -1, p.cache.num_pages - 1);  // here it must be mapped
  if (physical < 0) return;

  const auto at = [&](const PagedBuffer& buffer) {
    return static_cast<T*>(buffer.data) + physical * buffer.stride_page + h * buffer.stride_head;
  };
  T *const k_page = at(p.cache.k), *const v_page = at(p.cache.v);
  const T* const k = static_cast<const T*>(p.k) + h * p.k_stride_head;
  const T* const v = static_cast<const T*>(p.v) + h * p.v_stride_head + row * p.v_stride_token;
  const bool closes = p.summary.data != nullptr && (slot == page_size.slot(-1) || row == last - 1);
  const int32_t in_page = min(position - start, slot);  // tokens of this call before this one in the page
  const int32_t head_dim = static_cast<int32_t>(p.cache.head_dim);
#pragma unroll 1
  for (int32_t i = threadIdx.x % 32 * kPerVector; i < head_dim; i += 32 * kPerVector) {
    const auto vector = [i](const T* p) { return *reinterpret_cast<const uint4*>(p + i); };
    const uint4 key = vector(k + row * p.k_stride_token), value = vector(v);
    *reinterpret_cast<uint4*>(k_page + slot * p.cache.k.stride_token + i) = key;
    *reinterpret_cast<uint4*>(v_page + slot * p.cache.v.stride_token + i) = value;
    if (!closes) continue;
    uint4 low = key, high = key;
    const auto merge = [&](uint4 other) {
      low = min_vector<T>(low, other);
      high = max_vector<T>(high, other);
    };
#pragma unroll 4
    for (int32_t s = 0; s < slot - in_page; ++s) merge(vector(k_page + s * p.cache.k.stride_token));
#pragma unroll 2
    for (int32_t s = 1; s <= in_page; ++s) merge(vector(k + (row - s) * p.k_stride_token));
    T* const summary = static_cast<T*>(p.summary.data) + physical * p.summary.stride_page + h * p.summary.stride_head;
    *reinterpret_cast<uint4*>(summary + i) = low;
    *reinterpret_cast<uint4*>(summary + head_dim + i) = high;
  }
}

}  // namespace lil::cuda

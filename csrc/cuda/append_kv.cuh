// One warp appends one token of one KV head. The token that closes a page (its last slot, or the sequence's last token)
// also renews the page's summary: from the cache for slots that were there, from k for those that this call adds, so no
// warp waits for another's writes.
#pragma once

#include "cuda/numbers.cuh"
#include "cuda/pages.cuh"

namespace lil::cuda {

// Elements of a row that a lane takes at a time: 16 bytes; or four where the summary is float8, so that a row of 128
// keeps all lanes busy.
template <class T, class S>
struct AppendVector {
  static constexpr int kElements = kIsFloat8<S> ? 4 : 16 / sizeof(T), kBytes = kElements * sizeof(T);
  using type = std::conditional_t<kBytes == 16, uint4, std::conditional_t<kBytes == 8, uint2, uint32_t>>;
};

// The elements at `at` of k or v as they are stored: the same, or float8 of value / scale.
template <class T, class Vector>
__device__ inline Vector new_vector(const void* data, DType dtype, int64_t at, float scale) {
  if constexpr (kIsFloat8<T>) {
    uint32_t packed = 0;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      packed |= static_cast<uint32_t>(from_float<T>(load_float(data, dtype, at + i) / scale).__x) << 8 * i;
    }
    return packed;
  } else {
    return *reinterpret_cast<const Vector*>(static_cast<const T*>(data) + at);
  }
}

// A page's summary, one vector of elements at a time: `add` every row, then `store` both vectors. Bounds that the
// summary cannot hold exactly, which only float8 has, are rounded to the outside.
template <class T, class S>
struct SummaryBuilder {
  using Vector = typename AppendVector<T, S>::type;
  static constexpr int kElements = AppendVector<T, S>::kElements;

  SummaryMode mode;
  Vector low, high;
  int32_t count = 1;
  float first[kElements], sum[kElements], squares[kElements];  // of differences from the first row

  __device__ SummaryBuilder(SummaryMode mode, const Vector& row) : mode(mode), low(row), high(row) {
#pragma unroll
    for (int i = 0; i < kElements; ++i) {
      first[i] = to_float(reinterpret_cast<const T*>(&row)[i]);
      sum[i] = squares[i] = 0;
    }
  }

  __device__ void add(const Vector& row) {
    if (mode == SummaryMode::kMinMax) {
      low = min_vector<T>(low, row);
      high = max_vector<T>(high, row);
      return;
    }
    ++count;
#pragma unroll
    for (int i = 0; i < kElements; ++i) {
      const float x = to_float(reinterpret_cast<const T*>(&row)[i]) - first[i];
      sum[i] += x;
      squares[i] = fmaf(x, x, squares[i]);
    }
  }

  __device__ void store(S* summary, int32_t head_dim) {
    constexpr bool kSame = std::is_same_v<T, S>;
    using Row = typename AppendVector<S, S>::type;
    Row rows[2];
    if constexpr (kSame) {
      rows[0] = low;
      rows[1] = high;
    }
    S *const first_row = reinterpret_cast<S*>(&rows[0]), *const second_row = reinterpret_cast<S*>(&rows[1]);
#pragma unroll
    for (int i = 0; i < kElements; ++i) {
      if (mode == SummaryMode::kMeanStd) {
        const float mean = sum[i] / count;
        first_row[i] = from_float<S>(first[i] + mean);
        second_row[i] = from_float<S>(sqrtf(max_nan(0, squares[i] / count - mean * mean)));
      } else if constexpr (!kSame) {
        first_row[i] = float8_bound(to_float(reinterpret_cast<const T*>(&low)[i]), false);
        second_row[i] = float8_bound(to_float(reinterpret_cast<const T*>(&high)[i]), true);
      }
    }
    *reinterpret_cast<Row*>(summary) = rows[0];
    *reinterpret_cast<Row*>(summary + head_dim) = rows[1];
  }
};

// Tokens [first, last) of k and v are sequence b's; `row` is one of them. The cache stores T, its summaries S.
template <class T, class S>
__device__ void append_token(const AppendKvParams& p, int32_t row, int32_t b, int32_t h, int32_t first, int32_t last,
                             Finding& finding) {
  using Vector = typename AppendVector<T, S>::type;
  constexpr int kElements = AppendVector<T, S>::kElements;
  const PageSize page_size(p.cache.page_size);
  // The new rows, or what is looked at first of long ones, come to L1 while the length and the page are looked up.
  const int32_t head_dim = static_cast<int32_t>(p.cache.head_dim), element = threadIdx.x % 32 * kElements;
  if (element < head_dim) {
    const auto prefetch_row = [&](const void* data, int64_t stride_token, int64_t stride_head) {
      const int64_t at = row * stride_token + h * stride_head + element;
      const int64_t bytes = p.k_dtype == DType::kFloat32 ? 4 : p.k_dtype == DType::kFloat8E4M3 ? 1 : 2;
      prefetch(static_cast<const char*>(data) + at * bytes);
    };
    prefetch_row(p.k, p.k_stride_token, p.k_stride_head);
    prefetch_row(p.v, p.v_stride_token, p.v_stride_head);
  }
  const int32_t length = checked_length(finding, p.seq_lens, b, p.pages.max_pages << page_size.shift);
  if (finding.wrong != Wrong::kNothing || (!p.cu_seqlens && length == 0)) return;
  finding.note(last - first > length, Wrong::kSeqLensShort, length, last - first);
  if (last - first > length) return;
  const int32_t given = p.slots ? p.slots[b * p.cache.kv_heads + h] : -1;
  const bool bad = given < -1 || given >= length;
  finding.note(bad, Wrong::kSlots, given, length - 1);
  if (bad) return;
  const int32_t start = given >= 0 ? given : length - (last - first), position = start + row - first;
  const int32_t slot = page_size.slot(position);
  const int64_t physical = checked_page(finding, p.pages, b, h, page_size.page(position), p.cache.num_pages);
  finding.note(physical < 0, Wrong::kPageTable, -1, p.cache.num_pages - 1);  // here it must be mapped
  if (physical < 0) return;

  const auto at = [&](const PagedBuffer& buffer) {
    return static_cast<T*>(buffer.data) + physical * buffer.stride_page + h * buffer.stride_head;
  };
  T *const k_page = at(p.cache.k), *const v_page = at(p.cache.v);
  const float k_scale = p.cache.k_scale.at(physical, h), v_scale = p.cache.v_scale.at(physical, h);
  const bool closes = p.summary.data != nullptr && (slot == page_size.slot(-1) || row == last - 1);
  const int32_t in_page = min(position - start, slot);  // tokens of this call before this one in the page
#pragma unroll 1
  for (int32_t i = element; i < head_dim; i += 32 * kElements) {
    const auto new_key = [&](int32_t r) {
      return new_vector<T, Vector>(p.k, p.k_dtype, r * p.k_stride_token + h * p.k_stride_head + i, k_scale);
    };
    const auto old_key = [&](int32_t s) {
      return *reinterpret_cast<const Vector*>(k_page + s * p.cache.k.stride_token + i);
    };
    const Vector key = new_key(row);
    *reinterpret_cast<Vector*>(k_page + slot * p.cache.k.stride_token + i) = key;
    *reinterpret_cast<Vector*>(v_page + slot * p.cache.v.stride_token + i) =
        new_vector<T, Vector>(p.v, p.k_dtype, row * p.v_stride_token + h * p.v_stride_head + i, v_scale);
    if (!closes) continue;
    SummaryBuilder<T, S> builder(p.summary.mode, key);
    constexpr int kBatch = 8;  // rows asked for before any is looked at
    // Old slots lie before this call's, and behind the one that is given.
    const int32_t before = slot - in_page, valid = min(page_size.first(1), length - (position - slot));
    const int32_t old = valid - in_page - 1;
#pragma unroll 1
    for (int32_t first_slot = 0; first_slot < old; first_slot += kBatch) {
      Vector batch[kBatch];
#pragma unroll
      for (int j = 0; j < kBatch; ++j) {
        const int32_t s = first_slot + j;
        batch[j] = s < old ? old_key(s < before ? s : s + in_page + 1) : key;
      }
#pragma unroll
      for (int j = 0; j < kBatch; ++j) {
        if (first_slot + j < old) builder.add(batch[j]);
      }
    }
#pragma unroll 2
    for (int32_t s = 1; s <= in_page; ++s) builder.add(new_key(row - s));
    S* const summary = static_cast<S*>(p.summary.data) + physical * p.summary.stride_page + h * p.summary.stride_head;
    builder.store(summary + i, head_dim);
  }
}

}  // namespace lil::cuda

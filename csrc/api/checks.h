// Host checks shared by every operator and backend. A failed check throws before anything is written, with one
// message: "lil::OPERATOR: ARGUMENT: expected ..., got ...".
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <cmath>
#include <cstdio>
#include <initializer_list>
#include <optional>
#include <stdexcept>
#include <string>
#include <type_traits>

#include "params.h"

namespace lil {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

[[noreturn]] inline void fail(const char* op, const char* arg, const std::string& expected, const std::string& got) {
  throw std::runtime_error(std::string("lil::") + op + ": " + arg + ": expected " + expected + ", got " + got);
}

// No iostreams: where the compiler links them statically, this library's copy and the process's own clash.
inline void append_text(std::string& out, const std::string& part) { out += part; }
inline void append_text(std::string& out, const char* part) { out += part; }
template <class Number>
  requires std::is_arithmetic_v<Number>
void append_text(std::string& out, Number part) {
  if constexpr (std::is_floating_point_v<Number>) {
    char digits[32];
    std::snprintf(digits, sizeof digits, "%g", static_cast<double>(part));
    out += digits;
  } else {
    out += std::to_string(part);
  }
}

template <class... Parts>
std::string text(const Parts&... parts) {
  std::string out;
  (append_text(out, parts), ...);
  return out;
}

// The message is built only when the check fails: the hot path pays for a comparison.
#define LIL_CHECK(condition, op, arg, expected, got) \
  do {                                               \
    if (!(condition)) [[unlikely]]                   \
      ::lil::fail(op, arg, expected, got);           \
  } while (false)

inline std::string shape_text(const Tensor& t) {
  std::string out = "[";
  for (int64_t i = 0; i < t.dim(); ++i) out += text(i ? ", " : "", t.size(i));
  return out + "]";
}

inline std::string device_text(const Tensor& t) {
  if (t.is_cpu()) return "cpu";
  return text(t.is_cuda() ? "cuda:" : "device ", static_cast<int>(t.get_device_index()));
}

// -1 in `sizes` accepts any size. `meaning` names the dimensions, such as "[batch, q_heads, head_dim]".
inline void check_shape(const Tensor& t, const char* op, const char* arg, const char* meaning,
                        std::initializer_list<int64_t> sizes) {
  bool ok = t.dim() == static_cast<int64_t>(sizes.size());
  int64_t i = 0;
  if (ok) {
    for (int64_t size : sizes) {
      ok = ok && (size < 0 || t.size(i) == size);
      ++i;
    }
  }
  if (ok) [[likely]]
    return;
  std::string want;
  for (int64_t size : sizes) want += text(want.empty() ? "" : ", ", size < 0 ? "*" : text(size));
  fail(op, arg, text("shape ", meaning, " = [", want, "]"), shape_text(t));
}

inline void check_dtype(const Tensor& t, const char* op, const char* arg, ScalarType dtype) {
  LIL_CHECK(t.scalar_type() == dtype, op, arg, torch::headeronly::toString(dtype),
            torch::headeronly::toString(t.scalar_type()));
}

inline DType check_float_dtype(const Tensor& t, const char* op, const char* arg,
                               const char* expected = "dtype float32, float16 or bfloat16") {
  switch (t.scalar_type()) {
    case ScalarType::Float:
      return DType::kFloat32;
    case ScalarType::Half:
      return DType::kFloat16;
    case ScalarType::BFloat16:
      return DType::kBFloat16;
    default:
      fail(op, arg, expected, torch::headeronly::toString(t.scalar_type()));
  }
}

inline bool is_float8(const Tensor& t) { return t.scalar_type() == ScalarType::Float8_e4m3fn; }

// What a cache, or a page summary, may be stored as.
inline DType check_stored_dtype(const Tensor& t, const char* op, const char* arg) {
  if (is_float8(t)) return DType::kFloat8E4M3;
  return check_float_dtype(t, op, arg, "dtype float32, float16, bfloat16 or float8_e4m3fn");
}

inline void check_device(const Tensor& t, const Tensor& like, const char* op, const char* arg) {
  LIL_CHECK(t.is_cpu() == like.is_cpu() && (t.is_cpu() || t.get_device_index() == like.get_device_index()), op, arg,
            text("device ", device_text(like)), device_text(t));
}

inline void check_last_contiguous(const Tensor& t, const char* op, const char* arg) {
  const int64_t last = t.dim() - 1;
  LIL_CHECK(t.size(last) <= 1 || t.stride(last) == 1, op, arg, "a contiguous last dimension",
            text("stride ", t.stride(last)));
}

// A contiguous int32 (or other) tensor of the given shape on the given device.
inline void check_dense(const Tensor& t, const Tensor& like, const char* op, const char* arg, const char* meaning,
                        std::initializer_list<int64_t> sizes, ScalarType dtype = ScalarType::Int) {
  check_device(t, like, op, arg);
  check_dtype(t, op, arg, dtype);
  check_shape(t, op, arg, meaning, sizes);
  LIL_CHECK(t.is_contiguous(), op, arg, "a contiguous tensor", "a strided one");
}

inline void check_page_size(int64_t page_size, const char* op, const char* arg) {
  LIL_CHECK(page_size >= 8 && page_size <= 128 && (page_size & (page_size - 1)) == 0, op, arg,
            "a page size that is a power of two from 8 to 128", text(page_size));
}

inline void check_head_dim(int64_t head_dim, const char* op, const char* arg) {
  LIL_CHECK(head_dim == 64 || head_dim == 80 || head_dim == 96 || head_dim == 128 || head_dim == 192 || head_dim == 256,
            op, arg, "a head_dim of 64, 80, 96, 128, 192 or 256", text(head_dim));
}

// Every row of t, along its last dimension, begins at a multiple of `alignment` bytes. Backend::kAlignment says what
// the backend's vectors need.
inline void check_aligned(const Tensor& t, const char* op, const char* arg, int64_t alignment) {
  const int64_t size = t.scalar_type() == ScalarType::Float ? 4 : is_float8(t) ? 1 : 2;
  bool ok = reinterpret_cast<uintptr_t>(t.const_data_ptr()) % alignment == 0;
  for (int64_t i = 0; i + 1 < t.dim(); ++i) ok = ok && (t.size(i) < 2 || t.stride(i) * size % alignment == 0);
  LIL_CHECK(ok, op, arg, text("rows that begin at multiples of ", alignment, " bytes"), "others");
}

// The factor of q . k, of a float32; None: 1 / sqrt(head_dim).
inline float checked_scale(const std::optional<double>& scale, int64_t head_dim, const char* op) {
  const float value = static_cast<float>(scale.value_or(1.0 / std::sqrt(static_cast<double>(head_dim))));
  LIL_CHECK(std::isfinite(value), op, "scale", "a number of a size that float32 has", text(*scale));
  return value;
}

inline float checked_softcap(double softcap, const char* op) {
  const float value = static_cast<float>(softcap);
  LIL_CHECK(softcap == 0 || (value > 0 && std::isfinite(value)), op, "softcap",
            "at least 0 (0: none), of a size that float32 has", text(softcap));
  return value;
}

inline const int32_t* int32_data(const Tensor& t) { return static_cast<const int32_t*>(t.const_data_ptr()); }

// Tokens, and places in a list, are counted in int32.
inline void check_max_pages(int64_t pages, int64_t page_size, const char* op, const char* arg) {
  const int64_t most = (INT32_MAX - 128) / page_size;
  LIL_CHECK(pages <= most, op, arg, text("at most ", most, " pages"), text(pages));
}

inline std::string lengths_text(int64_t max_tokens) {
  return text("0 to ", max_tokens, " tokens", max_tokens == INT32_MAX ? "" : " (max_pages * page_size)");
}

// [batch, max_pages], or [batch, kv_heads, max_pages] where heads have tables of their own.
inline PageTable make_page_table(const Tensor& t, const Tensor& like, const char* op, int64_t batch, int64_t kv_heads,
                                 int64_t page_size) {
  const char* arg = "page_table";
  check_device(t, like, op, arg);
  check_dtype(t, op, arg, ScalarType::Int);
  const bool per_head = t.dim() == 3;
  if (per_head) {
    check_shape(t, op, arg, "[batch, kv_heads, max_pages]", {batch, kv_heads, -1});
  } else {
    check_shape(t, op, arg, "[batch, max_pages]", {batch, -1});
  }
  check_last_contiguous(t, op, arg);
  const int64_t max_pages = t.size(per_head ? 2 : 1);
  check_max_pages(max_pages, page_size, op, arg);
  return {int32_data(t), t.stride(0), per_head ? t.stride(1) : 0, max_pages};
}

// [kv_heads], or [num_pages, kv_heads]: what the stored values of `scaled` are multiplied by.
inline Scale make_scale(const std::optional<Tensor>& t, const Tensor& scaled, const char* op, const char* arg,
                        int64_t num_pages, int64_t kv_heads) {
  if (!t) return {};
  LIL_CHECK(is_float8(scaled), op, arg, "None where values are not stored as Float8_e4m3fn", shape_text(*t));
  const bool per_page = t->dim() == 2;
  if (per_page) {
    check_dense(*t, scaled, op, arg, "[num_pages, kv_heads]", {num_pages, kv_heads}, ScalarType::Float);
  } else {
    check_dense(*t, scaled, op, arg, "[kv_heads]", {kv_heads}, ScalarType::Float);
  }
  return {static_cast<const float*>(t->const_data_ptr()), per_page ? kv_heads : 0};
}

// Both buffers of one layer's cache; shapes [num_pages, kv_heads, page_size, head_dim].
inline KvCache make_kv_cache(const Tensor& k, const Tensor& v, const std::optional<Tensor>& k_scale,
                             const std::optional<Tensor>& v_scale, const char* op) {
  const char* meaning = "[num_pages, kv_heads, page_size, head_dim]";
  check_shape(k, op, "k_cache", meaning, {-1, -1, -1, -1});
  check_shape(v, op, "v_cache", meaning, {k.size(0), k.size(1), k.size(2), k.size(3)});
  check_device(v, k, op, "v_cache");
  const DType dtype = check_stored_dtype(k, op, "k_cache");
  check_dtype(v, op, "v_cache", k.scalar_type());
  check_page_size(k.size(2), op, "k_cache");
  check_head_dim(k.size(3), op, "k_cache");
  check_last_contiguous(k, op, "k_cache");
  check_last_contiguous(v, op, "v_cache");
  return {{const_cast<void*>(k.const_data_ptr()), k.stride(0), k.stride(1), k.stride(2)},
          {const_cast<void*>(v.const_data_ptr()), v.stride(0), v.stride(1), v.stride(2)},
          k.size(0),
          k.size(1),
          k.size(2),
          k.size(3),
          dtype,
          make_scale(k_scale, k, op, "k_scale", k.size(0), k.size(1)),
          make_scale(v_scale, v, op, "v_scale", k.size(0), k.size(1))};
}

// Of a summary that the operator makes.
inline SummaryMode check_made_summary(const std::string& mode, const char* op) {
  if (mode == "minmax") return SummaryMode::kMinMax;
  LIL_CHECK(mode != "representative", op, "summary_mode",
            "'minmax' or 'meanstd' (which keys represent a page is for the policy to say)", "'representative'");
  LIL_CHECK(mode == "meanstd", op, "summary_mode", "'minmax' or 'meanstd'", "'" + mode + "'");
  return SummaryMode::kMeanStd;
}

// Of a summary that it reads.
inline SummaryMode check_read_summary(const std::string& mode, const char* op) {
  if (mode == "minmax") return SummaryMode::kMinMax;
  if (mode == "meanstd") return SummaryMode::kMeanStd;
  LIL_CHECK(mode == "representative", op, "summary_mode", "'minmax', 'meanstd' or 'representative'", "'" + mode + "'");
  return SummaryMode::kRepresentative;
}

// -1 in num_pages and kv_heads accepts any.
inline Summary make_summary(const Tensor& t, const Tensor& like, const char* op, int64_t num_pages, int64_t kv_heads,
                            int64_t head_dim, SummaryMode mode) {
  const char* arg = "summary";
  check_device(t, like, op, arg);
  const DType dtype = check_stored_dtype(t, op, arg);
  if (mode == SummaryMode::kRepresentative) {
    check_shape(t, op, arg, "[num_pages, kv_heads, r, head_dim]", {num_pages, kv_heads, -1, head_dim});
  } else {
    check_shape(t, op, arg, "[num_pages, kv_heads, 2, head_dim]", {num_pages, kv_heads, 2, head_dim});
  }
  const int64_t vectors = t.size(2);
  LIL_CHECK(vectors >= 1 && vectors <= kMaxRepresentatives, op, arg,
            text("1 to ", kMaxRepresentatives, " representative keys"), text(vectors));
  check_last_contiguous(t, op, arg);
  LIL_CHECK(vectors == 1 || t.stride(2) == head_dim, op, arg, "its last two dimensions contiguous",
            text("stride ", t.stride(2)));
  return {const_cast<void*>(t.const_data_ptr()), t.stride(0), t.stride(1), vectors, mode, dtype};
}

// The pages that were read, one list a (sequence, KV head), as select_pages gives them.
struct PageLists {
  const int32_t *pages, *counts;
  int64_t stride_b, stride_h, capacity;
};

inline PageLists make_page_lists(const Tensor& pages, const std::optional<Tensor>& counts, const Tensor& like,
                                 const char* op, int64_t batch, int64_t kv_heads) {
  check_device(pages, like, op, "pages");
  check_dtype(pages, op, "pages", ScalarType::Int);
  check_shape(pages, op, "pages", "[batch, kv_heads, capacity]", {batch, kv_heads, -1});
  check_last_contiguous(pages, op, "pages");
  if (counts) check_dense(*counts, like, op, "counts", "[batch, kv_heads]", {batch, kv_heads});
  return {int32_data(pages), counts ? int32_data(*counts) : nullptr, pages.stride(0), pages.stride(1), pages.size(2)};
}

}  // namespace lil

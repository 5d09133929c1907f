#pragma once

#include <torch/csrc/stable/ops.h>

#include <vector>

#include "api/checks.h"

namespace lil {

template <class Backend>
Tensor decode_linear(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias,
                     const std::optional<Tensor>& norm, double eps, bool gated, const std::optional<Tensor>& residual,
                     const std::optional<Tensor>& cos, const std::optional<Tensor>& sin, int64_t rotated) {
  const char* op = "decode_linear";
  const DType dtype = check_float_dtype(x, op, "x");
  LIL_CHECK(x.dim() >= 1, op, "x", "shape [..., in_features]", shape_text(x));
  LIL_CHECK(x.is_contiguous(), op, "x", "a contiguous tensor", "a strided one");
  const int64_t in_features = x.size(x.dim() - 1);
  std::vector<int64_t> shape;
  int64_t rows = 1;
  for (int64_t i = 0; i + 1 < x.dim(); ++i) {
    shape.push_back(x.size(i));
    rows *= x.size(i);
  }
  LIL_CHECK(rows <= kMaxLinearRows, op, "x", text("at most ", kMaxLinearRows, " rows"), text(rows));
  LIL_CHECK(in_features > 0 && in_features % 16 == 0, op, "x", "in_features a multiple of 16", text(in_features));
  check_dense(weight, x, op, "weight", "[out_features, in_features]", {-1, in_features}, x.scalar_type());
  const int64_t unit = gated ? 32 : 16;
  LIL_CHECK(weight.size(0) > 0 && weight.size(0) % unit == 0, op, "weight",
            text("out_features a multiple of 16", gated ? ", twice as many rows" : ""), text(weight.size(0), " rows"));
  // Kernels count rows and columns, and a few beyond the last, in int32.
  constexpr int64_t most = int64_t{1} << 30;
  LIL_CHECK(weight.size(0) <= most && in_features <= most, op, "weight", text("at most ", most, " rows and columns"),
            shape_text(weight));
  const int64_t out_features = gated ? weight.size(0) / 2 : weight.size(0);
  LIL_CHECK(!(gated && bias), op, "bias", "None where gated", shape_text(*bias));
  if (bias) check_dense(*bias, x, op, "bias", "[out_features]", {out_features}, x.scalar_type());
  if (norm) check_dense(*norm, x, op, "norm", "[in_features]", {in_features}, x.scalar_type());
  LIL_CHECK(eps >= 0, op, "eps", "at least 0", text(eps));
  const auto check_rows = [&](const Tensor& t, const char* arg, const char* meaning, int64_t last) {
    check_device(t, x, op, arg);
    check_dtype(t, op, arg, x.scalar_type());
    bool same = t.dim() == x.dim() && t.is_contiguous() && t.size(x.dim() - 1) == last;
    for (int64_t i = 0; same && i + 1 < x.dim(); ++i) same = t.size(i) == x.size(i);
    LIL_CHECK(same, op, arg, meaning, shape_text(t));
  };
  if (residual) check_rows(*residual, "residual", "contiguous, of the output's shape", out_features);
  int64_t head_dim = 1;
  LIL_CHECK(cos.has_value() == sin.has_value(), op, "sin", cos ? "a tensor, as cos is" : "None, as cos is",
            sin ? shape_text(*sin) : "None");
  if (cos) {
    LIL_CHECK(!gated, op, "cos", "None where gated", shape_text(*cos));
    head_dim = cos->dim() > 0 ? cos->size(cos->dim() - 1) : 0;
    LIL_CHECK(head_dim > 0 && head_dim % 32 == 0, op, "cos", "head_dim a multiple of 32", text(head_dim));
    const char* meaning = "contiguous, of shape [..., head_dim] with x's leading dimensions";
    check_rows(*cos, "cos", meaning, head_dim);
    check_rows(*sin, "sin", meaning, head_dim);
    LIL_CHECK(rotated > 0 && rotated <= out_features && rotated % head_dim == 0, op, "rotated",
              text("a multiple of head_dim, ", head_dim, ", up to ", out_features), text(rotated));
  } else {
    LIL_CHECK(rotated == 0, op, "rotated", "0 without cos", text(rotated));
  }
  check_aligned(x, op, "x", Backend::kAlignment);
  check_aligned(weight, op, "weight", Backend::kAlignment);
  if (norm) check_aligned(*norm, op, "norm", Backend::kAlignment);
  const auto data = [](const std::optional<Tensor>& t) { return t ? t->const_data_ptr() : nullptr; };
  shape.push_back(out_features);
  Tensor out = torch::stable::new_empty(x, shape);
  const DecodeLinearParams params{dtype,
                                  x.const_data_ptr(),
                                  weight.const_data_ptr(),
                                  data(bias),
                                  data(norm),
                                  data(residual),
                                  data(cos),
                                  data(sin),
                                  out.mutable_data_ptr(),
                                  rows,
                                  in_features,
                                  out_features,
                                  rotated,
                                  head_dim,
                                  gated,
                                  static_cast<float>(eps)};
  if (rows > 0) Backend::decode_linear(params, x);
  return out;
}

}  // namespace lil

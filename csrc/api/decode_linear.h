#pragma once

#include <torch/csrc/stable/ops.h>

#include <vector>

#include "api/checks.h"

namespace lil {

template <class Backend>
Tensor decode_linear(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias,
                     const std::optional<Tensor>& norm, double eps, bool gated, const std::optional<Tensor>& residual) {
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
  LIL_CHECK(weight.size(0) <= INT32_MAX && in_features <= INT32_MAX, op, "weight",
            "at most 2147483647 rows and columns", shape_text(weight));
  const int64_t out_features = gated ? weight.size(0) / 2 : weight.size(0);
  LIL_CHECK(!(gated && bias), op, "bias", "None where gated", shape_text(*bias));
  if (bias) check_dense(*bias, x, op, "bias", "[out_features]", {out_features}, x.scalar_type());
  if (norm) check_dense(*norm, x, op, "norm", "[in_features]", {in_features}, x.scalar_type());
  LIL_CHECK(eps >= 0, op, "eps", "at least 0", text(eps));
  shape.push_back(out_features);
  if (residual) {
    check_device(*residual, x, op, "residual");
    check_dtype(*residual, op, "residual", x.scalar_type());
    bool same = residual->dim() == x.dim() && residual->is_contiguous();
    for (int64_t i = 0; same && i < x.dim(); ++i) same = residual->size(i) == shape[i];
    LIL_CHECK(same, op, "residual", "contiguous, of the output's shape", shape_text(*residual));
  }
  check_aligned(x, op, "x", Backend::kAlignment);
  check_aligned(weight, op, "weight", Backend::kAlignment);
  if (norm) check_aligned(*norm, op, "norm", Backend::kAlignment);
  const auto data = [](const std::optional<Tensor>& t) { return t ? t->const_data_ptr() : nullptr; };
  Tensor out = torch::stable::new_empty(x, shape);
  const DecodeLinearParams params{dtype,
                                  x.const_data_ptr(),
                                  weight.const_data_ptr(),
                                  data(bias),
                                  data(norm),
                                  data(residual),
                                  out.mutable_data_ptr(),
                                  rows,
                                  in_features,
                                  out_features,
                                  gated,
                                  static_cast<float>(eps)};
  if (rows > 0) Backend::decode_linear(params, x);
  return out;
}

}  // namespace lil

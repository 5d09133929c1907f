#pragma once

#include "api/checks.h"

namespace lil {

template <class Backend>
void guardian_check(const Tensor& sizes, const Tensor& num_tokens, const Tensor& interval, const Tensor& threshold,
                    Tensor checkpoint, Tensor gain, Tensor stop) {
  const char* op = "guardian_check";
  check_shape(sizes, op, "sizes", "[batch]", {-1});
  const int64_t batch = sizes.size(0);
  check_dense(sizes, sizes, op, "sizes", "[batch]", {batch});
  check_dense(num_tokens, sizes, op, "num_tokens", "[batch]", {batch});
  check_dense(interval, sizes, op, "interval", "[batch]", {batch});
  check_dense(threshold, sizes, op, "threshold", "[batch]", {batch}, ScalarType::Float);
  check_dense(checkpoint, sizes, op, "checkpoint", "[batch, 2]", {batch, 2});
  check_dense(gain, sizes, op, "gain", "[batch]", {batch});
  check_dense(stop, sizes, op, "stop", "[batch]", {batch});
  const GuardianCheckParams params{int32_data(sizes),
                                   int32_data(num_tokens),
                                   int32_data(interval),
                                   static_cast<const float*>(threshold.const_data_ptr()),
                                   static_cast<int32_t*>(checkpoint.mutable_data_ptr()),
                                   static_cast<int32_t*>(gain.mutable_data_ptr()),
                                   static_cast<int32_t*>(stop.mutable_data_ptr()),
                                   batch};
  if (batch > 0) Backend::guardian_check(params, sizes);
}

}  // namespace lil

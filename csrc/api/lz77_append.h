#pragma once

#include <torch/csrc/stable/ops.h>

#include <tuple>

#include "api/checks.h"
#include "lz77_state.h"

namespace lil {

template <class Backend>
std::tuple<Tensor, Tensor> lz77_append(Tensor state, const Tensor& tokens, const std::optional<Tensor>& counts,
                                       int64_t vocab_size) {
  const char* op = "lz77_append";
  check_shape(state, op, "state", "[batch, state_size]", {-1, -1});
  const int64_t batch = state.size(0), state_size = state.size(1);
  check_dense(state, state, op, "state", "[batch, state_size]", {batch, state_size});
  LIL_CHECK(state_size >= lz77::state_size(1), op, "state",
            text("a state_size of at least ", lz77::state_size(1), " (see lil_ops.lz77_state)"), text(state_size));
  check_device(tokens, state, op, "tokens");
  const ScalarType dtype = tokens.scalar_type();
  LIL_CHECK(dtype == ScalarType::Int || dtype == ScalarType::Long, op, "tokens", "dtype int32 or int64",
            torch::headeronly::toString(dtype));
  check_shape(tokens, op, "tokens", "[batch, max_tokens]", {batch, -1});
  check_last_contiguous(tokens, op, "tokens");
  if (counts) check_dense(*counts, state, op, "counts", "[batch]", {batch});
  LIL_CHECK(vocab_size >= 1 && vocab_size <= INT32_MAX, op, "vocab_size", "1 to 2147483647", text(vocab_size));

  Tensor phrases = torch::stable::new_empty(state, {batch});
  Tensor bits = torch::stable::new_empty(state, {batch});
  const Lz77AppendParams params{static_cast<int32_t*>(state.mutable_data_ptr()),
                                state_size,
                                tokens.const_data_ptr(),
                                tokens.stride(0),
                                dtype == ScalarType::Long,
                                counts ? int32_data(*counts) : nullptr,
                                batch,
                                tokens.size(1),
                                vocab_size,
                                static_cast<int32_t*>(phrases.mutable_data_ptr()),
                                static_cast<int32_t*>(bits.mutable_data_ptr())};
  if (batch > 0) Backend::lz77_append(params, state);
  return {phrases, bits};
}

}  // namespace lil

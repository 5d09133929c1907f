// Every launcher begins with `const Launch launch(tensor)`: the tensor's device is current while it lives, and stream
// is torch's current stream there.
#pragma once

#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/macros.h>
#include <torch/csrc/stable/tensor.h>

#include "params.h"

namespace lil::cuda {

using torch::stable::Tensor;

struct Launch {
  torch::stable::accelerator::DeviceGuard guard;
  cudaStream_t stream;

  explicit Launch(const Tensor& on) : guard(on.get_device_index()), stream(current_stream(on)) {}

 private:
  static cudaStream_t current_stream(const Tensor& on) {
    void* stream = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(on.get_device_index(), &stream));
    return static_cast<cudaStream_t>(stream);
  }
};

}  // namespace lil::cuda

// Every launcher begins with `const Launch launch(tensor)`: the tensor's device is current while it lives, and stream
// is torch's current stream there.
#pragma once

#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/tensor.h>

#include <mutex>
#include <stdexcept>
#include <string>

#include "params.h"

namespace lil::cuda {

using torch::stable::Tensor;

// torch's own STD_CUDA_CHECK, compiled against 2.13, needs a function that 2.11 does not have.
inline void check_cuda(cudaError_t error) {
  if (error != cudaSuccess) throw std::runtime_error(std::string("lil_ops: CUDA: ") + cudaGetErrorString(error));
}

constexpr int kMaxCluster = 8;  // blocks that one cluster holds on every device that has clusters

// What the launchers ask of a device, read once.
// major: of the code that runs there, which may be older than the device (PTX of an earlier architecture).
struct Device {
  int index, sms, major;
  size_t max_shared;              // bytes of shared memory a block can have
  int clusters[kMaxCluster + 1];  // of so many blocks that run at once, a block on a multiprocessor: fewer than fill it
};
constexpr int kMaxDevices = 64;
const Device& current_device();

struct Launch {
  torch::stable::accelerator::DeviceGuard guard;
  cudaStream_t stream;

  explicit Launch(const Tensor& on) : guard(on.get_device_index()), stream(current_stream(on)) {}

  // Starts `kernel` as soon as the one before it on the stream lets go (programmatic dependent launch): its blocks are
  // in place when the data is. So a kernel calls wait_for_previous() before it reads what others wrote.
  template <class Kernel, class... Args>
  void operator()(Kernel* kernel, dim3 grid, int threads, size_t shared_bytes, int cluster, const Args&... args) const {
    constexpr unsigned kMost = 65535;
    if (grid.y > kMost || grid.z > kMost) {
      throw std::runtime_error(
          "lil: on CUDA: expected at most 65535 sequences, and KV heads times blocks of query heads");
    }
    cudaLaunchAttribute attributes[2];
    int count = 0;
    if (current_device().major >= 9) {
      attributes[count].id = cudaLaunchAttributeProgrammaticStreamSerialization;
      attributes[count++].val.programmaticStreamSerializationAllowed = 1;
      if (cluster > 1) {
        attributes[count].id = cudaLaunchAttributeClusterDimension;
        attributes[count].val.clusterDim.x = cluster;
        attributes[count].val.clusterDim.y = attributes[count].val.clusterDim.z = 1;
        ++count;
      }
    }
    cudaLaunchConfig_t config{};
    config.gridDim = grid;
    config.blockDim = dim3(threads);
    config.dynamicSmemBytes = shared_bytes;
    config.stream = stream;
    config.attrs = attributes;
    config.numAttrs = count;
    check_cuda(cudaLaunchKernelEx(&config, kernel, args...));
  }

 private:
  static cudaStream_t current_stream(const Tensor& on) {
    void* stream = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(on.get_device_index(), &stream));
    return static_cast<cudaStream_t>(stream);
  }
};

// Raises the kernel's limit of dynamic shared memory on the current device, once for each larger size (48 KB less the
// kernel's static part need no leave). What shared memory does not take is L1, which holds the loads in flight: it is
// not asked for more than is used.
template <auto Kernel>
void allow_shared(size_t bytes) {
  static std::mutex mutex;
  static size_t allowed[kMaxDevices];
  if (bytes <= 32 * 1024) return;
  const std::lock_guard lock(mutex);
  size_t& there = allowed[current_device().index];
  if (there >= bytes) return;
  check_cuda(cudaFuncSetAttribute(Kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(bytes)));
  there = bytes;
}

#if defined(__CUDACC__)
__device__ inline void wait_for_previous() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// The next kernel's blocks may start. After wait_for_previous(), or in a kernel whose every block waits later: then
// whoever waits for this kernel has also waited for those before it.
__device__ inline void let_next_start() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}
#endif

}  // namespace lil::cuda

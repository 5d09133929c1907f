#include <algorithm>
#include <mutex>

#include "cuda/launch.cuh"

namespace lil::cuda {
namespace {

__global__ void probe() {}

void read(int index, Device& device) {
  cudaFuncAttributes code{};
  int major = 0, shared = 0;
  STD_CUDA_CHECK(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, index));
  STD_CUDA_CHECK(cudaDeviceGetAttribute(&device.sms, cudaDevAttrMultiProcessorCount, index));
  STD_CUDA_CHECK(cudaDeviceGetAttribute(&shared, cudaDevAttrMaxSharedMemoryPerBlockOptin, index));
  STD_CUDA_CHECK(cudaFuncGetAttributes(&code, probe));
  device.index = index;
  device.major = std::min(major, code.ptxVersion / 10);
  device.max_shared = shared;
}

}  // namespace

const Device& current_device() {
  static Device devices[kMaxDevices];
  static std::once_flag once[kMaxDevices];
  int index = 0;
  STD_CUDA_CHECK(cudaGetDevice(&index));
  std::call_once(once[index], [&] { read(index, devices[index]); });
  return devices[index];
}

}  // namespace lil::cuda

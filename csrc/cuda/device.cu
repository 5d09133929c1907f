#include <algorithm>
#include <mutex>

#include "cuda/launch.cuh"

namespace lil::cuda {
namespace {

__global__ void probe() {}

void read(int index, Device& device) {
  cudaFuncAttributes code{};
  int major = 0, shared = 0;
  check_cuda(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, index));
  check_cuda(cudaDeviceGetAttribute(&device.sms, cudaDevAttrMultiProcessorCount, index));
  check_cuda(cudaDeviceGetAttribute(&shared, cudaDevAttrMaxSharedMemoryPerBlockOptin, index));
  check_cuda(cudaFuncGetAttributes(&code, probe));
  device.index = index;
  device.major = std::min(major, code.ptxVersion / 10);
  device.max_shared = shared;
  if (device.major < 9) return;
  check_cuda(cudaFuncSetAttribute(probe, cudaFuncAttributeMaxDynamicSharedMemorySize, shared));
  for (int blocks = 1; blocks <= kMaxCluster; ++blocks) {
    cudaLaunchAttribute cluster{};
    cluster.id = cudaLaunchAttributeClusterDimension;
    cluster.val.clusterDim = {static_cast<unsigned>(blocks), 1, 1};
    cudaLaunchConfig_t config{};
    config.gridDim = dim3(blocks);
    config.blockDim = dim3(32);
    config.dynamicSmemBytes = shared;  // no second block beside it
    config.attrs = &cluster;
    config.numAttrs = 1;
    check_cuda(cudaOccupancyMaxActiveClusters(&device.clusters[blocks], probe, &config));
  }
}

}  // namespace

const Device& current_device() {
  static Device devices[kMaxDevices];
  static std::once_flag once[kMaxDevices];
  int index = 0;
  check_cuda(cudaGetDevice(&index));
  std::call_once(once[index], [&] { read(index, devices[index]); });
  return devices[index];
}

}  // namespace lil::cuda

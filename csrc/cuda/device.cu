#include "cuda/launch.cuh"

namespace lil::cuda {

const Device& current_device() {
  static Device devices[kMaxDevices];
  int index = 0;
  STD_CUDA_CHECK(cudaGetDevice(&index));
  Device& device = devices[index];
  // Two threads that come here at once write the same values.
  if (device.sms == 0) {
    device.index = index;
    int sms = 0;
    STD_CUDA_CHECK(cudaDeviceGetAttribute(&device.major, cudaDevAttrComputeCapabilityMajor, index));
    STD_CUDA_CHECK(cudaDeviceGetAttribute(&sms, cudaDevAttrMultiProcessorCount, index));
    device.sms = sms;
  }
  return device;
}

}  // namespace lil::cuda

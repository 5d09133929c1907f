#include "cuda/launch.cuh"
#include "guardian_check.h"

namespace lil::cuda {
namespace {

__global__ void guardian_check_kernel(GuardianCheckParams p) {
  const int64_t b = blockIdx.x * static_cast<int64_t>(blockDim.x) + threadIdx.x;
  if (b < p.batch) guardian_check_one(p, b);
}

}  // namespace

void guardian_check(const GuardianCheckParams& p, const Tensor& on) {
  constexpr int kThreads = 128;
  const Launch launch(on);
  guardian_check_kernel<<<(p.batch + kThreads - 1) / kThreads, kThreads, 0, launch.stream>>>(p);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

}  // namespace lil::cuda

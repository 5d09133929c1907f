#include "cuda/launch.cuh"
#include "guardian_check.h"

namespace lil::cuda {
namespace {

__global__ void guardian_check_kernel(const __grid_constant__ GuardianCheckParams p) {
  wait_for_previous();
  let_next_start();
  const int64_t b = blockIdx.x * static_cast<int64_t>(blockDim.x) + threadIdx.x;
  if (b < p.batch) guardian_check_one(p, b);
}

}  // namespace

void guardian_check(const GuardianCheckParams& p, const Tensor& on) {
  constexpr int kThreads = 128;
  const Launch launch(on);
  launch(guardian_check_kernel, dim3((p.batch + kThreads - 1) / kThreads), kThreads, 0, 1, p);
}

}  // namespace lil::cuda

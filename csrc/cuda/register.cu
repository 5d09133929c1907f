// The CUDA kernels' registration. An operator's host check is the one in api/, shared with the CPU.
#include <torch/csrc/stable/library.h>

#include "api/guardian_check.h"
#include "cuda/launch.cuh"

namespace lil::cuda {

void guardian_check(const GuardianCheckParams&, const Tensor& on);

struct Backend {
  static constexpr auto guardian_check = &cuda::guardian_check;
};

}  // namespace lil::cuda

STABLE_TORCH_LIBRARY_IMPL(lil, CUDA, m) {
  m.impl("guardian_check", TORCH_BOX(&lil::guardian_check<lil::cuda::Backend>));
}

#include <vector>

#include "cpu/backend.h"
#include "cpu/kernels/kernels.h"

namespace lil::cpu {

void decode_linear(const DecodeLinearParams& p, const Tensor&) {
  thread_local std::vector<float> scratch;
  scratch.resize(p.rows * p.in_features);
  float* const x = scratch.data();
  const Kernels& isa = kernels();
  isa.linear_input(p, x);
  // A block of rotated outputs has twice as many.
  torch::stable::parallel_for(0, (p.out_features - p.rotated / 2) / kLinearOutputs, 1,
                              [&](int64_t begin, int64_t end) { isa.linear_outputs(p, x, begin, end); });
}

}  // namespace lil::cpu

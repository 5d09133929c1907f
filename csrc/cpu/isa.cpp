// Chooses the kernels' instruction set, once.
#include <cstdlib>
#include <cstring>

#include "cpu/kernels/kernels.h"

namespace lil::cpu {

namespace generic {
extern const Kernels kKernels;
}
namespace avx2 {
extern const Kernels kKernels;
}
namespace avx512 {
extern const Kernels kKernels;
}

namespace {

const Kernels& choose() {
  const char* wanted = std::getenv("LIL_CPU_ISA");
  [[maybe_unused]] const auto allowed = [&](const char* name) {
    return wanted == nullptr || std::strcmp(wanted, name) == 0;
  };
#ifdef LIL_HAVE_avx512
  if (allowed("avx512") && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq")) {
    return avx512::kKernels;
  }
#endif
#ifdef LIL_HAVE_avx2
  if (allowed("avx2") && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
      __builtin_cpu_supports("f16c")) {
    return avx2::kKernels;
  }
#endif
  return generic::kKernels;
}

}  // namespace

const Kernels& kernels() {
  static const Kernels& chosen = choose();
  return chosen;
}

}  // namespace lil::cpu

extern "C" __attribute__((visibility("default"))) const char* lil_cpu_isa() { return lil::cpu::kernels().name; }

// Chooses the kernels' instruction set, once.
#include <cstdlib>
#include <stdexcept>
#include <string>

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
  const char* variable = std::getenv("LIL_CPU_ISA");
  const std::string wanted = variable ? variable : "";
  if (!wanted.empty() && wanted != "generic" && wanted != "avx2" && wanted != "avx512") {
    throw std::runtime_error("lil_ops: LIL_CPU_ISA: expected generic, avx2 or avx512, got '" + wanted + "'");
  }
  [[maybe_unused]] const auto allowed = [&](const char* name) { return wanted.empty() || wanted == name; };
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

// For ctypes, which no exception may reach: null where there is one, and its message in `error`.
extern "C" __attribute__((visibility("default"))) const char* lil_cpu_isa(const char** error) {
  try {
    return lil::cpu::kernels().name;
  } catch (const std::runtime_error& failure) {
    static thread_local std::string text;
    text = failure.what();
    *error = text.c_str();
    return nullptr;
  }
}

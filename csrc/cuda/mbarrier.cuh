// Barriers in shared memory that count arrivals and bytes (Hopper and newer).
#pragma once

#include "cuda/numbers.cuh"

namespace lil::cuda {

using Barrier = uint64_t;  // an mbarrier

#if __CUDA_ARCH__ >= 900

__device__ inline void barrier_init(Barrier& barrier, int32_t arrivals) {
  asm volatile("mbarrier.init.shared.b64 [%0], %1;" ::"r"(shared_address(&barrier)), "r"(arrivals) : "memory");
}
// Before the barrier that others wait at, so that copies and stores find what barrier_init has written.
__device__ inline void barriers_are_ready() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }

__device__ inline void barrier_arrive(Barrier& barrier) {
  asm volatile("mbarrier.arrive.shared.b64 _, [%0];" ::"r"(shared_address(&barrier)) : "memory");
}
// Before arriving where a copy to what was read may be the answer: without it, a copy has been seen to overtake a read.
__device__ inline void reads_are_done() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// Arrives, and has the barrier wait for so many bytes.
__device__ inline void barrier_expect(Barrier& barrier, int32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared.b64 _, [%0], %1;" ::"r"(shared_address(&barrier)), "r"(bytes)
               : "memory");
}
// Until the phase of this parity is over.
__device__ inline void barrier_wait(Barrier& barrier, uint32_t parity) {
  asm volatile(
      "{\n"
      ".reg .pred over;\n"
      "AGAIN: mbarrier.try_wait.parity.shared.b64 over, [%0], %1;\n"
      "@!over bra AGAIN;\n"
      "}" ::"r"(shared_address(&barrier)),
      "r"(parity)
      : "memory");
}

// Whether it is.
__device__ inline bool barrier_is_over(Barrier& barrier, uint32_t parity) {
  uint32_t is_over;
  asm volatile(
      "{\n"
      ".reg .pred over;\n"
      "mbarrier.test_wait.parity.shared.b64 over, [%1], %2;\n"
      "selp.u32 %0, 1, 0, over;\n"
      "}"
      : "=r"(is_over)
      : "r"(shared_address(&barrier)), "r"(parity)
      : "memory");
  return is_over;
}

#endif

}  // namespace lil::cuda

// Bulk copies to shared memory that report to a barrier there (Hopper and newer).
#pragma once

#include <cstdint>

namespace lil::cuda {

#if __CUDA_ARCH__ >= 900

using Barrier = uint64_t;  // an mbarrier

__device__ inline uint32_t shared_address(const void* p) { return static_cast<uint32_t>(__cvta_generic_to_shared(p)); }

__device__ inline void barrier_init(Barrier& barrier, int32_t arrivals) {
  asm volatile("mbarrier.init.shared.b64 [%0], %1;" ::"r"(shared_address(&barrier)), "r"(arrivals) : "memory");
}
// Before a __syncthreads, so that copies find what barrier_init has written.
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

// The L2 policy of what is read once: it leaves before what others will read again.
__device__ inline uint64_t evict_first() {
  uint64_t policy;
  asm volatile("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
  return policy;
}

// Addresses and bytes are multiples of 16.
__device__ inline void bulk_copy(void* to, const void* from, int32_t bytes, Barrier& barrier, uint64_t policy) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1], %2, [%3], %4;" ::
          "r"(shared_address(to)),
      "l"(from), "r"(bytes), "r"(shared_address(&barrier)), "l"(policy)
      : "memory");
}
__device__ inline void bulk_prefetch(const void* from, int32_t bytes) {
  asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(from), "r"(bytes) : "memory");
}

#endif

}  // namespace lil::cuda

// Bulk copies to shared memory that report to a barrier there (Hopper and newer).
#pragma once

#include "cuda/mbarrier.cuh"

namespace lil::cuda {

#if __CUDA_ARCH__ >= 900

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

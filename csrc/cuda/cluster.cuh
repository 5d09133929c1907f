// Blocks of one thread block cluster (Hopper and newer) and their shared memory. Elsewhere a kernel runs without
// clusters, and none of this does anything.
#pragma once

#include <cooperative_groups.h>

#include <cstdint>

#include "cuda/mbarrier.cuh"

namespace lil::cuda {

// The first half of a cluster's barrier tells the others that this block runs: before that its memory must not be
// touched. The second half comes later, when they surely do.
__device__ inline void cluster_arrive() {
#if __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory");
#endif
}
__device__ inline void cluster_arrive_release() {
#if __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
#endif
}
__device__ inline void cluster_wait() {
#if __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
#endif
}

// Writes to the place in block `rank`'s shared memory that `here` is in this block's.
template <class V>
__device__ inline void remote_store(V* here, int32_t rank, V value) {
#if __CUDA_ARCH__ >= 900
  *cooperative_groups::this_cluster().map_shared_rank(here, rank) = value;
#endif
}

// What comes by remote_send, once, and can be waited for without a barrier of all. (Whoever releases the cluster's
// waits until all is done that he has asked of memory, elsewhere too.) remote_expect: by one thread, before
// cluster_arrive().
__device__ inline void remote_expect(Barrier& barrier, int32_t bytes) {
#if __CUDA_ARCH__ >= 900
  barrier_init(barrier, 1);
  barriers_are_ready();
  barrier_expect(barrier, bytes);
#endif
}

// As remote_store; counted by that block's `barrier`.
template <class V>
__device__ inline void remote_send(V* here, int32_t rank, V value, Barrier& barrier) {
  static_assert(sizeof(V) == 8 || sizeof(V) == 16);
#if __CUDA_ARCH__ >= 900
  const auto there = [&](const void* p) {
    uint32_t address;
    asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(address) : "r"(shared_address(p)), "r"(rank));
    return address;
  };
  if constexpr (sizeof(V) == 16) {
    asm volatile(
        "st.async.shared::cluster.mbarrier::complete_tx::bytes.v4.f32 [%0], {%2, %3, %4, %5}, [%1];" ::"r"(there(here)),
        "r"(there(&barrier)), "f"(value.x), "f"(value.y), "f"(value.z), "f"(value.w)
        : "memory");
  } else {
    asm volatile(
        "st.async.shared::cluster.mbarrier::complete_tx::bytes.v2.f32 [%0], {%2, %3}, [%1];" ::"r"(there(here)),
        "r"(there(&barrier)), "f"(value.x), "f"(value.y)
        : "memory");
  }
#endif
}

// Until all that was expected is there. Then nobody needs this block's memory any more.
// (As barrier_wait, and what other blocks have written is seen.)
__device__ inline void remote_wait(Barrier& barrier) {
#if __CUDA_ARCH__ >= 900
  asm volatile(
      "{\n"
      ".reg .pred over;\n"
      "AGAIN: mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 over, [%0], 0;\n"
      "@!over bra AGAIN;\n"
      "}" ::"r"(shared_address(&barrier))
      : "memory");
#endif
}

}  // namespace lil::cuda

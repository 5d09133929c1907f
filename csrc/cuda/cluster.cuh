// Blocks of one thread block cluster (Hopper and newer) and their shared memory. Elsewhere a kernel runs without
// clusters, and none of this does anything.
#pragma once

#include <cooperative_groups.h>

#include <cstdint>

namespace lil::cuda {

// The first half of a cluster's barrier tells the others that this block runs: before that its memory must not be
// touched. The second half comes much later, when they surely do.
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

}  // namespace lil::cuda

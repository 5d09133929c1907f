// fold_mass: a thread a slot; in rule stamp one block a (sequence, KV head), whose slots are compared with each other.
#include "cuda/backend.h"
#include "cuda/launch.cuh"
#include "fold_mass.h"

namespace lil::cuda {
namespace {

constexpr int kThreads = 128;
constexpr int64_t kMostSlots = 8192;  // of a head, in rule stamp: their masses are in shared memory

// The mass of slot s of KV head h: the sum over its query heads (shared: over all), in their order. 0 past the end.
__device__ float sum_heads(const FoldMassParams& p, int64_t b, int64_t h, int64_t s) {
  if (s >= p.entries) return 0;
  const int32_t heads = p.shared ? p.q_heads : p.group;
  const float* const mass = p.mass + (b * p.q_heads + (p.shared ? 0 : h * p.group)) * p.entries + s;
  float sum = 0;
#pragma unroll 8
  for (int32_t i = 0; i < heads; ++i) sum += mass[i * p.entries];
  return sum;
}

__global__ void __launch_bounds__(kThreads) fold_slots_kernel(const __grid_constant__ FoldMassParams p) {
  const int64_t h = blockIdx.y, b = blockIdx.z, s = blockIdx.x * static_cast<int64_t>(kThreads) + threadIdx.x;
  const int64_t at = (b * p.kv_heads + h) * p.capacity + s;
  wait_for_previous();
  let_next_start();
  if (s < p.capacity) p.priority[at] = folded(p, p.priority[at], sum_heads(p, b, h, s), p.held[at], p.seq_lens[b]);
}

__global__ void __launch_bounds__(kThreads) fold_stamp_kernel(const __grid_constant__ FoldMassParams p) {
  extern __shared__ float mass[];  // NaN, which is not more than anything, where nothing is held
  const int64_t h = blockIdx.y, b = blockIdx.z, first = (b * p.kv_heads + h) * p.capacity;
  const int32_t capacity = static_cast<int32_t>(p.capacity);
  wait_for_previous();
  let_next_start();
  const int32_t length = p.seq_lens[b];
  int32_t mine = 0;
  for (int32_t s = threadIdx.x; s < capacity; s += kThreads) {
    const bool held = p.held[first + s] >= 0;
    mine += held;
    mass[s] = held ? sum_heads(p, b, h, s) : __int_as_float(0x7fffffff);
  }
  __shared__ int32_t counts[kThreads / 32];
  mine = __reduce_add_sync(~0u, mine);
  if (threadIdx.x % 32 == 0) counts[threadIdx.x / 32] = mine;
  __syncthreads();
  int32_t count = 0;
#pragma unroll
  for (int w = 0; w < kThreads / 32; ++w) count += counts[w];
  for (int32_t s = threadIdx.x; s < capacity; s += kThreads) {
    int32_t more = 0;
    for (int32_t other = 0; other < capacity; ++other) more += mass[other] > mass[s];
    if (stamps(p, p.held[first + s], length, more, count)) p.priority[first + s] = static_cast<float>(length);
  }
}

}  // namespace

void fold_mass(const FoldMassParams& p, const Tensor& on) {
  const Launch launch(on);
  const dim3 heads(1, p.kv_heads, p.batch);
  if (p.rule == FoldRule::kStamp) {
    LIL_CHECK(p.capacity <= kMostSlots, "fold_mass", "priority",
              text("at most ", kMostSlots, " slots on CUDA with rule 'stamp'"), text(p.capacity));
    launch(fold_stamp_kernel, heads, kThreads, p.capacity * sizeof(float), 1, p);
  } else {
    const dim3 slots((p.capacity + kThreads - 1) / kThreads, heads.y, heads.z);
    launch(fold_slots_kernel, slots, kThreads, 0, 1, p);
  }
}

}  // namespace lil::cuda

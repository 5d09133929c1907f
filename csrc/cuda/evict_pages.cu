// evict_pages: one block a (sequence, KV head). Its threads look for the slot with the least key.
#include "cuda/backend.h"
#include "cuda/launch.cuh"
#include "cuda/pages.cuh"
#include "evict_pages.h"

namespace lil::cuda {
namespace {

constexpr int kThreads = 256, kWarps = kThreads / 32;
constexpr int kBatch = 4;  // slots asked for before any is looked at

struct Candidate {
  uint64_t key;
  int32_t slot;

  // Of equals the first slot: so the result does not depend on which threads met which slots.
  __device__ void take_if_less(uint64_t other, int32_t other_slot) {
    if (other < key || (other == key && other_slot < slot)) key = other, slot = other_slot;
  }
};

// The least of the warp's candidates, in every lane.
__device__ Candidate least_of_warp(const Candidate& mine) {
  constexpr uint32_t kNone = ~0u;
  const uint32_t high = mine.key >> 32, low = static_cast<uint32_t>(mine.key);
  const uint32_t least_high = __reduce_min_sync(kNone, high);
  const uint32_t least_low = __reduce_min_sync(kNone, high == least_high ? low : kNone);
  const uint64_t least = uint64_t{least_high} << 32 | least_low;
  const uint32_t slot = __reduce_min_sync(kNone, mine.key == least ? static_cast<uint32_t>(mine.slot) : kNone);
  return {least, static_cast<int32_t>(slot)};
}

// Slots of one thread, kThreads apart.
struct Batch {
  int32_t page[kBatch];
  float priority[kBatch];

  __device__ Batch(const int32_t* held, const float* priorities, int32_t first, int32_t capacity) {
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      const int32_t s = first + i * kThreads;
      page[i] = s < capacity ? held[s] : -1;
      priority[i] = s < capacity ? priorities[s] : 0;
    }
  }
};

__global__ void __launch_bounds__(kThreads)
    evict_pages_kernel(const __grid_constant__ EvictPagesParams p, ErrorWord* errors) {
  __shared__ Candidate candidates[kWarps];
  const int32_t h = blockIdx.x, b = blockIdx.y, capacity = static_cast<int32_t>(p.capacity);
  const int64_t head = b * p.kv_heads + h;
  const int32_t* const held = p.held + head * p.capacity;
  const float* const priorities = p.priority + head * p.capacity;
  wait_for_previous();
  let_next_start();
  // On its way together with the length.
  Batch batch(held, priorities, threadIdx.x, capacity);
  Finding finding;
  const Eviction eviction(p, b, checked_length(finding, p.seq_lens, b, p.max_tokens));
  Candidate mine{Eviction::kRecent, static_cast<int32_t>(threadIdx.x)};
#pragma unroll 1
  for (int32_t first = threadIdx.x; first < capacity;) {
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      const int32_t s = first + i * kThreads, page = batch.page[i];
      const bool wrong = page < -1 || page > eviction.newest();
      finding.note(wrong && eviction.newest() >= 0, Wrong::kHeld, page, eviction.newest());
      if (s < capacity) mine.take_if_less(eviction.key(page, batch.priority[i]), s);
    }
    first += kBatch * kThreads;
    batch = Batch(held, priorities, first, capacity);
  }
  mine = least_of_warp(mine);
  if (threadIdx.x % 32 == 0) candidates[threadIdx.x / 32] = mine;
  const bool bad = __syncthreads_or(finding.wrong != Wrong::kNothing);
  if (threadIdx.x == 0) {
#pragma unroll
    for (int w = 1; w < kWarps; ++w) mine.take_if_less(candidates[w].key, candidates[w].slot);
    const int32_t physical = p.slot_pages && !bad ? p.slot_pages[b * p.capacity + mine.slot] : 0;
    finding.note(physical < 0, Wrong::kSlotPages, physical, 0);
    p.slots[head] = bad || physical < 0 ? -1 : eviction.fill(p, b, h, mine.slot, mine.key);
  }
  finding.report(errors, Op::kEvictPages, b);
}

}  // namespace

void evict_pages(const EvictPagesParams& p, const Tensor& on) {
  const Launch launch(on);
  launch(evict_pages_kernel, dim3(p.kv_heads, p.batch), kThreads, 0, 1, p, error_word());
}

}  // namespace lil::cuda

// Selection by one block, without sorting. A page's rank is an integer of 64 bits: the score, as an integer in the order
// of the scores, and below it the place in the list counted from the end, so that no two are equal and the earlier page
// wins a tie. The k-th best is found digit by digit (a histogram of eight bits a pass) until at most 32 pages can be it;
// then one warp compares those. One scan in page order writes the chosen pages, ascending.
#pragma once

#include "cuda/pages.cuh"

namespace lil::cuda {

// NaN is best; -0 equals 0.
__device__ inline uint32_t score_key(float x) {
  if (isnan(x)) return ~0u;
  const uint32_t bits = __float_as_uint(x + 0.0f);
  return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

struct SelectScratch {
  uint32_t histogram[2][256];  // in turn: one is cleared while the other is read
  uint32_t low[32], high[32];  // one a warp
  uint32_t bin, above, in_bin, num_candidates;
  uint64_t candidates[32];
};

// The largest bin whose ranks, with those of the bins above, reach `wanted`; by the first warp, eight bins a lane.
__device__ inline void find_bin(SelectScratch& s, const uint32_t* histogram, uint32_t wanted) {
  const uint32_t lane = threadIdx.x;
  uint32_t count[8], mine = 0;
#pragma unroll
  for (int i = 0; i < 8; ++i) mine += count[i] = histogram[8 * lane + i];
  uint32_t from_top = mine;  // this lane's bins and all above
#pragma unroll
  for (uint32_t step = 1; step < 32; step *= 2) {
    const uint32_t other = __shfl_down_sync(~0u, from_top, step);
    if (lane + step < 32) from_top += other;
  }
  uint32_t above = from_top - mine;
  if (above >= wanted || from_top < wanted) return;
#pragma unroll
  for (int i = 7; i >= 0; --i) {
    if (above < wanted && above + count[i] >= wanted) s.bin = 8 * lane + i, s.above = above, s.in_bin = count[i];
    above += count[i];
  }
}

// Writes the `k` best of scores[0, n), 0 < k < n, as first_page + index, ascending. The whole block calls it; out is
// complete after the next __syncthreads().
__device__ inline void select_best(SelectScratch& s, const float* scores, int32_t n, int32_t k, int32_t first_page,
                                   int32_t* out) {
  constexpr int32_t kCached = 8;  // keys a thread keeps in registers; it reads others again in each pass
  const int32_t lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;
  // Each warp has a stretch of pages, a multiple of 32.
  const int32_t stretch = ceil_div(n, warps * 32) * 32, begin = min(n, warp * stretch), end = min(n, begin + stretch);
  uint32_t keys[kCached];
#pragma unroll
  for (int32_t j = 0; j < kCached; ++j) {
    const int32_t i = begin + 32 * j + lane;
    keys[j] = i < end ? score_key(scores[i]) : 0;
  }
  // Calls f(page index, key, whether there is such a page), by whole warps.
  const auto for_each = [&](auto f) {
#pragma unroll
    for (int32_t j = 0; j < kCached; ++j) {
      const int32_t i = begin + 32 * j + lane;
      if (begin + 32 * j < end) f(i, keys[j], i < end);
    }
    for (int32_t first = begin + 32 * kCached; first < end; first += 32) {
      const int32_t i = first + lane;
      f(i, i < end ? score_key(scores[i]) : 0, i < end);
    }
  };

  uint32_t low = ~0u, high = 0;
  for_each([&](int32_t, uint32_t key, bool there) {
    if (there) low = min(low, key), high = max(high, key);
  });
  low = __reduce_min_sync(~0u, low);
  high = __reduce_max_sync(~0u, high);
  __syncthreads();  // an earlier call may still read the scratch
  if (lane == 0) s.low[warp] = low, s.high[warp] = high;
  for (int32_t i = threadIdx.x; i < 256; i += blockDim.x) s.histogram[0][i] = 0;
  if (threadIdx.x == 0) s.num_candidates = 0;
  __syncthreads();
  for (int32_t w = 0; w < warps; ++w) low = min(low, s.low[w]), high = max(high, s.high[w]);
  // Counted from the smallest key and shifted up, so that the first digit already tells most ranks apart.
  const int32_t shift = __clzll(static_cast<int64_t>(static_cast<uint64_t>(high - low) << 32 | (n - 1)));
  const auto rank_of = [&](int32_t i, uint32_t key) {
    return (static_cast<uint64_t>(key - low) << 32 | static_cast<uint32_t>(n - 1 - i)) << shift;
  };

  // Invariant: the k-th best is the `wanted`-th best of the `in_prefix` ranks whose first `known` bits are `prefix`.
  uint64_t prefix = 0;
  uint32_t known = 0, wanted = k, in_prefix = n;
  const auto in = [&](uint64_t rank) { return known == 0 || rank >> (64 - known) == prefix; };
  for (int32_t pass = 0; in_prefix > 32; ++pass) {
    uint32_t* const histogram = s.histogram[pass % 2];
    for_each([&](int32_t i, uint32_t key, bool there) {
      const uint64_t rank = rank_of(i, key);
      if (there && in(rank)) atomicAdd(&histogram[rank << known >> 56], 1);
    });
    __syncthreads();
    if (warp == 0) {
      find_bin(s, histogram, wanted);
    } else {
      for (int32_t i = threadIdx.x - 32; i < 256; i += blockDim.x - 32) s.histogram[(pass + 1) % 2][i] = 0;
    }
    __syncthreads();
    prefix = prefix << 8 | s.bin;
    wanted -= s.above;
    in_prefix = s.in_bin;
    known += 8;
  }

  for_each([&](int32_t i, uint32_t key, bool there) {
    const uint64_t rank = rank_of(i, key);
    if (there && in(rank)) s.candidates[atomicAdd(&s.num_candidates, 1)] = rank;
  });
  __syncthreads();
  const uint64_t mine = lane < in_prefix ? s.candidates[lane] : 0;
  uint32_t better = 0;
  for (uint32_t i = 0; i < in_prefix; ++i) better += s.candidates[i] > mine;
  const uint32_t found = __ballot_sync(~0u, lane < in_prefix && better == wanted - 1);
  const uint64_t pivot = __shfl_sync(~0u, mine, __ffs(found) - 1);

  // Each warp counts what it takes, then learns from the warps before it where its own pages begin.
  uint32_t taken = 0;
  for_each([&](int32_t i, uint32_t key, bool there) { taken += there && rank_of(i, key) >= pivot; });
  taken = __reduce_add_sync(~0u, taken);
  if (lane == 0) s.low[warp] = taken;
  __syncthreads();
  uint32_t at = 0;
  for (int32_t w = 0; w < warp; ++w) at += s.low[w];
  for_each([&](int32_t i, uint32_t key, bool there) {
    const bool take = there && rank_of(i, key) >= pivot;
    const uint32_t takers = __ballot_sync(~0u, take);
    if (take) out[at + __popc(takers & ((1u << lane) - 1))] = first_page + i;
    at += __popc(takers);
  });
}

// The pages that one KV head of sequence b reads, into `out`; returns how many. The sequence has more pages than
// p.capacity. As the CPU's select_one: recent pages first, then the head of the sequence, then the best of the rest.
__device__ inline void select_pages_of(SelectScratch& s, const SelectPagesParams& p, int32_t b, int32_t h,
                                       int32_t length, int32_t* out) {
  const int32_t page_size = static_cast<int32_t>(p.page_size), pages = ceil_div(length, page_size);
  const int32_t capacity = static_cast<int32_t>(p.capacity);
  const int32_t recent = static_cast<int32_t>(max(static_cast<int64_t>(0), length - p.recent)) / page_size;
  const int64_t protect = p.protected_lens ? max(static_cast<int64_t>(p.protected_lens[b]), p.sink) : p.sink;
  const int32_t room = capacity - (pages - recent);
  const int32_t head = static_cast<int32_t>(
      min(max(static_cast<int64_t>(0), (protect + page_size - 1) / page_size), static_cast<int64_t>(min(recent, room))));
  for (int32_t i = threadIdx.x; i < head; i += blockDim.x) out[i] = i;
  for (int32_t i = threadIdx.x; i < pages - recent; i += blockDim.x) out[room + i] = recent + i;
  if (room > head) {
    select_best(s, p.scores + b * p.stride_b + h * p.stride_h + head, recent - head, room - head, head, out + head);
  }
}

}  // namespace lil::cuda

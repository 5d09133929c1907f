// Selection by one block, without sorting. Scores become integers in the same order ("keys"). Few pages are chosen by
// comparing candidates with each other (select_few), many by radix (select_many). It runs once in a kernel, so it is
// short code: instructions come from memory too.
#pragma once

#include "cuda/loss.cuh"
#include "cuda/pages.cuh"

namespace lil::cuda {

// All ones where x, as a signed number, is negative. Comparisons are avoided where one waits for another: a predicate
// takes three times as long to be there as a number, and there are few of them. (In assembly, or it would be made one.)
__device__ inline uint32_t if_negative(uint32_t x) {
  uint32_t mask;
  asm("shr.s32 %0, %1, 31;" : "=r"(mask) : "r"(x));
  return mask;
}

// All ones where a < b: the borrow of the difference.
__device__ inline uint32_t if_less(uint32_t a, uint32_t b) { return if_negative((~a & b) | (~(a ^ b) & (a - b))); }

// The keys of NaN, the best there is, and of -inf. (An addition gives the NaN whose bits are all ones but the sign's.)
constexpr uint32_t kNanKey = 0xfffffffe, kLeastKey = 0x007fffff;

// -0 equals 0.
__device__ inline uint32_t score_key(float x) {
  const uint32_t bits = __float_as_uint(x + 0.0f);
  return min(bits ^ (if_negative(bits) | 0x80000000u), kNanKey);
}

__device__ inline float score_of_key(uint32_t key) {
  uint32_t bits;  // key ^ (~mask | the sign's bit), which the compiler makes two instructions of
  asm("lop3.b32 %0, %1, %2, 0x80000000, 0x4b;" : "=r"(bits) : "r"(key), "r"(if_negative(key)));
  return __uint_as_float(bits);
}

// Adds to a count in shared memory, by one lane of a warp; returns what it was. (atomicAdd would look for other lanes.)
__device__ inline uint32_t add_to(uint32_t* count, uint32_t x) {
  uint32_t before;
  asm volatile("atom.shared.add.u32 %0, [%1], %2;" : "=r"(before) : "r"(shared_address(count)), "r"(x) : "memory");
  return before;
}

constexpr int32_t kMostThreads = 512, kFewCandidates = 256, kFewChosen = kFewCandidates / 2;

struct alignas(16) SelectScratch {
  uint32_t histogram[2][256];        // in turn: one is cleared while the other is read
  int32_t best[kMostThreads];        // without their last bit, as few_keys
  int32_t few_keys[kFewCandidates];  // zeros beyond the candidates
  int32_t few_pages[kFewCandidates], chosen[kFewChosen];
  uint2 candidates[32];        // key, page
  uint32_t low[32], high[32];  // one a warp
  float unread[32];            // one a warp
  uint32_t bin, above, in_bin, num_candidates, num_chosen;
  uint32_t last_key;  // chosen are those of greater keys, and those of this key up to last_page
  int32_t last_page;
};

// Four bytes from global to shared memory, without a register between; complete after wait_for_copies().
__device__ inline void copy_async(uint32_t* to, const float* from) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4;" ::"r"(shared_address(to)), "l"(from) : "memory");
}
__device__ inline void wait_for_copies() { asm volatile("cp.async.wait_all;" ::: "memory"); }

// How many of `values`, none of which is negative, are greater than x (or less): every `lanes`-th group of four, from
// `lane` on, in batches of 16 a lane; what lies beyond `count` in the last batch is not.
template <bool kGreater>
__device__ inline int32_t count_of(const int32_t* values, int32_t count, int32_t x, int32_t lane, int32_t lanes) {
  constexpr int kBatch = 4;
  uint32_t found = 0;
  // The sign of the difference, which wraps nowhere.
  const auto is = [&](uint32_t other) { return (kGreater ? x - other : other - x) >> 31; };
#pragma unroll 1
  for (int32_t first = lane; 4 * first < count; first += kBatch * lanes) {
    int4 batch[kBatch];
#pragma unroll
    for (int u = 0; u < kBatch; ++u) batch[u] = reinterpret_cast<const int4*>(values)[first + u * lanes];
#pragma unroll
    for (const int4& others : batch) found += (is(others.x) + is(others.y)) + (is(others.z) + is(others.w));
  }
  return found;
}

constexpr int kKeyBatch = 4;  // pages a thread takes at once; of more, more are in vain where sequences are short

// Words of shared memory for the keys of so many pages.
__host__ __device__ constexpr int64_t key_words(int64_t pages, int32_t threads) {
  const int64_t batch = kKeyBatch * threads;
  return (pages + batch - 1) / batch * batch;
}

// The scores of pages [0, n) as keys: kept in shared memory, or made again in each pass where they are too many.
template <bool kStaged>
struct SelectKeys {
  static constexpr int kAtOnce = 4;  // a lane's consecutive pages

  const float* scores;
  uint32_t* staged;  // room for key_words(n, blockDim.x)
  int32_t n;

  __device__ uint32_t make(int32_t i) const { return i < n ? score_key(scores[i]) : 0; }

  // Calls f(page, j, keys) for this thread's pages, a batch at a time: the j-th is threadIdx.x + j * blockDim.x. (A
  // loop that asked for one key would wait for it.) Keys beyond n are 0, which no score has.
  template <class F>
  __device__ void for_batches(F f) const {
#pragma unroll 1
    for (int32_t first = threadIdx.x, j = 0; first < n; first += kKeyBatch * blockDim.x, j += kKeyBatch) {
      uint32_t batch[kKeyBatch];
#pragma unroll
      for (int u = 0; u < kKeyBatch; ++u) {
        const int32_t i = first + u * blockDim.x;
        batch[u] = kStaged ? staged[i] : make(i);
      }
      f(first, j, batch);
    }
  }

  // Asks for this thread's scores: all are on their way at once.
  __device__ void ask() const {
#pragma unroll 1
    for (int32_t first = threadIdx.x; kStaged && first < n; first += kKeyBatch * blockDim.x) {
#pragma unroll
      for (int u = 0; u < kKeyBatch; ++u) {
        const int32_t i = first + u * blockDim.x;
        copy_async(staged + i, scores + min(i, n - 1));
      }
    }
  }

  // After ask(): makes the keys of this thread's pages, for others after the next __syncthreads(). Returns the best.
  __device__ uint32_t stage() const {
    uint32_t best = 0;
    if constexpr (kStaged) wait_for_copies();
    for_batches([&](int32_t first, int32_t, uint32_t (&batch)[kKeyBatch]) {
#pragma unroll
      for (int u = 0; u < kKeyBatch; ++u) {
        if constexpr (kStaged) {
          const int32_t i = first + u * blockDim.x;
          batch[u] = score_key(__uint_as_float(batch[u])) & if_negative(i - n);
          staged[i] = batch[u];
        }
        best = max(best, batch[u]);
      }
    });
    return best;
  }

  __device__ uint4 load(int32_t i) const {
    if constexpr (kStaged) return *reinterpret_cast<const uint4*>(staged + i);
    return {make(i), make(i + 1), make(i + 2), make(i + 3)};
  }
};

// What select_few begins with; complete after the next __syncthreads().
__device__ inline void prepare_few(SelectScratch& s) {
  for (int32_t i = threadIdx.x; i < kFewCandidates; i += blockDim.x) s.few_keys[i] = 0;
  for (int32_t i = threadIdx.x; i < kFewChosen; i += blockDim.x) s.chosen[i] = INT32_MAX;
  if (threadIdx.x == 0) s.num_candidates = s.num_chosen = 0, s.last_key = kNanKey, s.last_page = INT32_MAX;
}

// Writes the `k` best pages of [0, n), 0 < k < n, as first_page + page, ascending, where `k` is at most 16 a warp and
// kFewChosen, and n at most 32 a thread; complete after the next __syncthreads(). `best`: what keys.stage() returned.
// Each warp finds a key that its share of the k reaches, one page a lane: so at least k pages reach the least of those
// keys, and seldom many more. They are ranked by comparing all with all. False, and nothing was written, where they are
// too many or where equals would have to be told apart. Keys are compared without their last bit, as numbers that are
// not negative: those that are the same without it are equals here.
template <bool kStaged>
__device__ bool select_few(SelectScratch& s, const SelectKeys<kStaged>& keys, uint32_t best, int32_t k,
                           int32_t first_page, int32_t* out) {
  const int32_t lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;  // a power of two
  const int32_t share = (k + warps - 1) >> (31 - __clz(warps)), own = best >> 1;
  s.best[threadIdx.x] = own;
  __syncwarp();
  const int32_t better_lanes = count_of<true>(s.best + 32 * warp, 32, own, 0, 1);
  const uint32_t reached = __reduce_min_sync(~0u, better_lanes < share ? own : INT32_MAX);
  if (lane == 0) s.low[warp] = reached;
  __syncthreads();
  const uint32_t least = max(1u, __reduce_min_sync(~0u, lane < warps ? s.low[lane] : ~0u));

  uint32_t mine = 0;  // bit j: this thread's j-th page
  keys.for_batches([&](int32_t, int32_t j, const uint32_t (&batch)[kKeyBatch]) {
    uint32_t misses = 0;
#pragma unroll
    for (int u = 0; u < kKeyBatch; ++u) misses |= ((batch[u] >> 1) - least) >> 31 << u;
    mine |= (~misses & ((1u << kKeyBatch) - 1)) << j;
  });
  // Every lane that has a page left adds one, all at once.
  const uint32_t below = (1u << lane) - 1, of_warp = __reduce_add_sync(~0u, __popc(mine));
  int32_t end = lane == 0 ? add_to(&s.num_candidates, of_warp) : 0;
  end = __shfl_sync(~0u, end, 0);
  if (end + of_warp > kFewCandidates) mine = 0;  // too many, whatever this warp adds
#pragma unroll 1
  for (uint32_t lanes; (lanes = __ballot_sync(~0u, mine != 0)) != 0; mine &= mine - 1, end += __popc(lanes)) {
    const int32_t at = end + __popc(lanes & below), i = threadIdx.x + (__ffs(mine) - 1) * blockDim.x;
    if (mine != 0) {
      s.few_keys[at] = (kStaged ? keys.staged[i] : keys.make(i)) >> 1, s.few_pages[at] = i;
    }
  }
  __syncthreads();
  const int32_t count = s.num_candidates;
  if (count > kFewCandidates) return false;

  // Two lanes a candidate: each compares it with half of the others.
#pragma unroll 1
  for (int32_t first = 0; first < count; first += blockDim.x / 2) {
    const int32_t i = first + static_cast<int32_t>(threadIdx.x) / 2, key = s.few_keys[min(i, kFewCandidates - 1)];
    int32_t better = count_of<true>(s.few_keys, count, key, threadIdx.x % 2, 2);
    better += __shfl_xor_sync(~0u, better, 1);
    const bool is_chosen = threadIdx.x % 2 == 0 && i < count && better < k;
    const uint32_t lanes = __ballot_sync(~0u, is_chosen);
    const int32_t last = __reduce_min_sync(~0u, is_chosen ? key : INT32_MAX);
    int32_t slot = 0;
    if (lane == 0) {
      slot = add_to(&s.num_chosen, __popc(lanes));
      if (lanes != 0) atomicMin(&s.last_key, 2u * last);
    }
    slot = __shfl_sync(~0u, slot, 0) + __popc(lanes & below);
    if (is_chosen && slot < k) s.chosen[slot] = s.few_pages[i];
  }
  __syncthreads();
  if (s.num_chosen != k) return false;
  // Four lanes a page: its place among the chosen.
#pragma unroll 1
  for (int32_t first = 0; first < k; first += blockDim.x / 4) {
    const int32_t i = first + static_cast<int32_t>(threadIdx.x) / 4, page = i < k ? s.chosen[i] : 0;
    int32_t before = count_of<false>(s.chosen, k, page, threadIdx.x % 4, 4);
    before += __shfl_xor_sync(~0u, before, 1);
    before += __shfl_xor_sync(~0u, before, 2);
    if (threadIdx.x % 4 == 0 && i < k) out[before] = first_page + page;
  }
  return true;
}

// The largest bin whose keys, with those of the bins above, reach `wanted`; by one warp, eight bins a lane.
__device__ inline void find_bin(SelectScratch& s, const uint32_t* histogram, uint32_t wanted) {
  const uint32_t lane = threadIdx.x % 32;
  const uint4 low = reinterpret_cast<const uint4*>(histogram)[2 * lane];
  const uint4 high = reinterpret_cast<const uint4*>(histogram)[2 * lane + 1];
  const uint32_t mine = low.x + low.y + low.z + low.w + high.x + high.y + high.z + high.w;
  uint32_t from_top = mine;  // this lane's bins and all above
#pragma unroll
  for (uint32_t step = 1; step < 32; step *= 2) {
    const uint32_t other = __shfl_down_sync(~0u, from_top, step);
    if (lane + step < 32) from_top += other;
  }
  uint32_t above = from_top - mine;
  if (above >= wanted || from_top < wanted) return;
#pragma unroll 1
  for (int32_t i = 8 * lane + 7;; --i) {
    const uint32_t count = histogram[i];
    if (above + count >= wanted) {
      s.bin = i, s.above = above, s.in_bin = count;
      return;
    }
    above += count;
  }
}

// Sum of x over the lanes of the warps before this one; every warp's own sum in `own`.
__device__ inline uint32_t sum_before(uint32_t* one_a_warp, uint32_t x, uint32_t& own) {
  const int32_t lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  own = __reduce_add_sync(~0u, x);
  __syncthreads();
  if (lane == 0) one_a_warp[warp] = own;
  __syncthreads();
  return __reduce_add_sync(~0u, lane < warp ? one_a_warp[lane] : 0);
}

// As select_few, for any k. Keys are counted from the smallest and shifted up, so that the first digit already tells
// most apart. The k-th best is found digit by digit (a histogram of eight bits a pass) until at most 32 pages can be
// it; then those are compared with each other. One scan in page order writes the chosen pages.
template <bool kStaged>
__device__ void select_many(SelectScratch& s, const SelectKeys<kStaged>& keys, int32_t k, int32_t first_page,
                            int32_t* out) {
  constexpr int32_t kStep = 32 * SelectKeys<kStaged>::kAtOnce;
  const int32_t n = keys.n, lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;
  uint32_t low = ~0u, high = 0;
  __syncthreads();  // keys are staged, and select_few is done with the scratch
  keys.for_batches([&](int32_t, int32_t, const uint32_t (&batch)[kKeyBatch]) {
#pragma unroll
    for (const uint32_t key : batch) low = min(low, key ? key : ~0u), high = max(high, key);
  });
  low = __reduce_min_sync(~0u, low);
  high = __reduce_max_sync(~0u, high);
  if (lane == 0) s.low[warp] = low, s.high[warp] = high;
  for (int32_t i = threadIdx.x; i < 256; i += blockDim.x) s.histogram[0][i] = 0;
  if (threadIdx.x == 0) s.num_candidates = 0;
  __syncthreads();
  low = __reduce_min_sync(~0u, lane < warps ? s.low[lane] : ~0u);
  high = __reduce_max_sync(~0u, lane < warps ? s.high[lane] : 0);
  const int32_t shift = high == low ? 0 : __clz(high - low);

  // Calls f(page, digits) for the pages of a warp's stretch, by whole warps.
  const int32_t stretch = ceil_div(n, warps * kStep) * kStep, begin = warp * stretch, end = min(n, begin + stretch);
  const auto for_each = [&](auto f) {
#pragma unroll 1
    for (int32_t i = begin + SelectKeys<kStaged>::kAtOnce * lane; i - SelectKeys<kStaged>::kAtOnce * lane < end;
         i += kStep) {
      const uint4 key = keys.load(min(i, (n - 1) & ~3));
      f(i, uint4{(key.x - low) << shift, (key.y - low) << shift, (key.z - low) << shift, (key.w - low) << shift});
    }
  };

  // Invariant: the k-th best is the `wanted`-th best of the `in_prefix` pages whose digits begin with `prefix`.
  uint32_t prefix = 0, known = 0, wanted = k, in_prefix = n;
  const auto in = [&](uint32_t digits) { return known == 0 || digits >> (32 - known) == prefix; };
#pragma unroll 1
  for (int32_t pass = 0; in_prefix > 32 && known < 32; ++pass) {
    uint32_t* const histogram = s.histogram[pass % 2];
    for_each([&](int32_t i, uint4 digits) {
      const auto count = [&](int32_t page, uint32_t d) {
        if (page < n && in(d)) atomicAdd(&histogram[d << known >> 24], 1);
      };
      count(i, digits.x), count(i + 1, digits.y), count(i + 2, digits.z), count(i + 3, digits.w);
    });
    __syncthreads();
    if (warp == 0) find_bin(s, histogram, wanted);
    for (int32_t i = threadIdx.x; i < 256; i += blockDim.x) s.histogram[(pass + 1) % 2][i] = 0;
    __syncthreads();
    prefix = prefix << 8 | s.bin;
    wanted -= s.above;
    in_prefix = s.in_bin;
    known += 8;
  }

  // The last page taken: its digits, and its place where others have the same. Each warp also counts what it takes.
  uint32_t last_digits = prefix, last_page = 0, above = 0, own = 0;
  if (in_prefix <= 32) {
    const uint32_t after = known == 0 ? ~0u : known == 32 ? prefix : prefix << (32 - known) | ~0u >> known;
    for_each([&](int32_t i, uint4 digits) {
      const auto gather = [&](int32_t page, uint32_t d) {
        if (page >= n) return;
        if (in(d)) s.candidates[atomicAdd(&s.num_candidates, 1)] = {d, static_cast<uint32_t>(page)};
        above += d > after;
      };
      gather(i, digits.x), gather(i + 1, digits.y), gather(i + 2, digits.z), gather(i + 3, digits.w);
    });
    __syncthreads();
    const uint2 mine = s.candidates[lane];
    uint32_t better = 0;
#pragma unroll 4
    for (uint32_t i = 0; i < in_prefix; ++i) {
      const uint2 other = s.candidates[i];
      better += other.x > mine.x || (other.x == mine.x && other.y < mine.y);
    }
    const bool taken = lane < in_prefix && better < wanted;
    const uint32_t last = __ffs(__ballot_sync(~0u, taken && better == wanted - 1)) - 1;
    last_digits = __shfl_sync(~0u, mine.x, last);
    last_page = __shfl_sync(~0u, mine.y, last);
    above += taken && static_cast<int32_t>(mine.y) >= begin && static_cast<int32_t>(mine.y) < end;
  } else {
    // More than 32 equal scores: the `wanted`-th of them in page order.
    uint32_t ties = 0;
    for_each([&](int32_t i, uint4 digits) {
      const auto count = [&](int32_t page, uint32_t d) {
        ties += page < n && d == prefix;
        above += page < n && d > prefix;
      };
      count(i, digits.x), count(i + 1, digits.y), count(i + 2, digits.z), count(i + 3, digits.w);
    });
    uint32_t before = sum_before(s.low, ties, own);
    above += lane == 0 ? min(own, wanted - min(before, wanted)) : 0;
    if (before < wanted && before + own >= wanted) {
#pragma unroll 1
      for (int32_t i = begin + lane; i - lane < end; i += 32) {
        const uint32_t lanes = __ballot_sync(~0u, i < end && (keys.make(i) - low) << shift == prefix);
        const uint32_t upto = __popc(lanes & (~0u >> (31 - lane)));
        if (before + upto == wanted && (lanes >> lane & 1)) s.bin = i;
        before += __popc(lanes);
      }
    }
    __syncthreads();
    last_page = s.bin;
  }

  uint32_t at = sum_before(s.high, above, own);
  if (threadIdx.x == 0) s.last_key = (last_digits >> shift) + low, s.last_page = last_page;
  const auto taken = [&](int32_t page, uint32_t d) -> uint32_t {
    return page < n && (d > last_digits || (d == last_digits && page <= static_cast<int32_t>(last_page)));
  };
  for_each([&](int32_t i, uint4 d) {
    const uint32_t flags = taken(i, d.x) | taken(i + 1, d.y) << 1 | taken(i + 2, d.z) << 2 | taken(i + 3, d.w) << 3;
    // Where this lane's pages begin among the warp's: counts are at most 4, so three ballots add them up.
    const uint32_t mine = __popc(flags), below = (1u << lane) - 1;
    const uint32_t ones = __ballot_sync(~0u, mine & 1), twos = __ballot_sync(~0u, mine & 2);
    const uint32_t fours = __ballot_sync(~0u, mine & 4);
    int32_t* to = out + at + __popc(ones & below) + 2 * __popc(twos & below) + 4 * __popc(fours & below);
    for (uint32_t rest = flags; rest; rest &= rest - 1) *to++ = first_page + i + __ffs(rest) - 1;
    at += __popc(ones) + 2 * __popc(twos) + 4 * __popc(fours);
  });
}

// Weighs one token of each page of `keys` that comes after the last one chosen: log2 of each warp's sum goes to
// s.unread. A sum is relative to the largest weight in it, a thread's and then its warp's: the last one chosen may lie
// far above.
template <bool kStaged>
__device__ void weigh_unread(SelectScratch& s, const SelectKeys<kStaged>& keys, float softcap) {
  const uint32_t last_key = s.last_key;
  const int32_t last_page = s.last_page;
  uint32_t most = kLeastKey;  // which weighs nothing
  float sum = 0;              // relative to the weight of `most`
  const auto relative_to = [&](uint32_t key) { return log2_weight(score_of_key(key), softcap); };
  // Without branches, so that the pages of a batch are weighed at once.
  const auto add = [&](auto capped) {
    keys.for_batches([&](int32_t first, int32_t, uint32_t (&batch)[kKeyBatch]) {
      const float before = relative_to(most);
#pragma unroll
      for (int u = 0; u < kKeyBatch; ++u) {
        const uint32_t is_later = (last_page - (first + u * blockDim.x)) >> 31;
        batch[u] = max(batch[u] & if_less(batch[u], last_key + is_later), kLeastKey);
        most = max(most, batch[u]);
      }
      const float base = finite_base(relative_to(most));
      sum *= exp2_approx(before - base);
#pragma unroll
      for (const uint32_t key : batch) {
        sum += exp2_approx(log2_weight(score_of_key(key), capped ? softcap : 0) - base);
      }
    });
  };
  softcap > 0 ? add(std::true_type()) : add(std::false_type());
  const float base = finite_base(relative_to(__reduce_max_sync(~0u, most)));
  sum *= exp2_approx(relative_to(most) - base);
#pragma unroll
  for (int32_t step = 1; step < 32; step *= 2) sum += __shfl_xor_sync(~0u, sum, step);
  if (threadIdx.x % 32 == 0) s.unread[threadIdx.x / 32] = base + __log2f(sum);
}

// log2 of the sum of all warps, at most eight, over all tokens: such pages are full. By whole warps, a lane for each.
__device__ inline float log2_unread(const SelectScratch& s, PageSize page_size) {
  const int32_t lane = threadIdx.x % 8;
  const float mine = lane < blockDim.x / 32 ? s.unread[lane] : -INFINITY;
  float most = mine;
#pragma unroll
  for (int32_t step = 1; step < 8; step *= 2) most = max_nan(most, __shfl_xor_sync(~0u, most, step));
  const float base = finite_base(most);
  float sum = exp2_approx(mine - base);
#pragma unroll
  for (int32_t step = 1; step < 8; step *= 2) sum += __shfl_xor_sync(~0u, sum, step);
  return base + __log2f(sum) + page_size.shift;
}

// The pages that one KV head of sequence b reads, into `out`. The sequence has more pages than p.capacity. `staged`:
// null, or room for key_words(all pages, blockDim.x). As the CPU's select_one: recent pages first, then the head of the
// sequence, then the best of the rest. Returns the keys of the rest, for weigh_unread; keep_rest: they are made even if
// none of them can be chosen.
template <bool kStaged>
__device__ SelectKeys<kStaged> select_pages_of(SelectScratch& s, const SelectPagesParams& p, int32_t b, int32_t h,
                                               int32_t length, uint32_t* staged, int32_t* out, bool keep_rest) {
  const PageSize page_size(p.page_size);
  const int32_t pages = page_size.pages(length), capacity = static_cast<int32_t>(p.capacity);
  const int32_t recent = page_size.page(max(0, length - static_cast<int32_t>(p.recent)));
  const int32_t protect = max(p.protected_lens ? p.protected_lens[b] : 0, static_cast<int32_t>(p.sink));
  const int32_t room = capacity - (pages - recent);
  const int32_t head = min(min(recent, room), min(pages, page_size.page(protect) + (page_size.slot(protect) != 0)));
  const int32_t k = room - head;
  const SelectKeys<kStaged> keys{p.scores + b * p.stride_b + h * p.stride_h + head, staged, recent - head};
  if (k > 0 || keep_rest) keys.ask();
  prepare_few(s);
  for (int32_t i = threadIdx.x; i < head; i += blockDim.x) out[i] = i;
  for (int32_t i = threadIdx.x; i < pages - recent; i += blockDim.x) out[room + i] = recent + i;
  if (k > 0 || keep_rest) {
    const uint32_t best = keys.stage();
    if (k == 0) {
      if (threadIdx.x == 0) s.last_key = kNanKey, s.last_page = -1;  // nothing is chosen: all come after it
    } else if (k > min(kFewChosen, static_cast<int32_t>(blockDim.x / 2)) || keys.n > 32 * blockDim.x ||
               !select_few(s, keys, best, k, head, out + head)) {
      select_many(s, keys, k, head, out + head);
    }
  }
  return keys;
}

}  // namespace lil::cuda

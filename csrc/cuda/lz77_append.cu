// lz77_append: no index. Where the longest earlier match of a position ends is found by comparing the sequence with
// itself, which a GPU does 32 tokens an instruction; that the work grows with the square of the length costs it less
// than the dependent loads of a tree would, which no other thread can hide.
//
// A few new tokens (`step`): kept in the state is a bit for each place where all of the pending phrase occurs. A token
// clears those after which another token comes. Where none is left, the phrase ends.
//
// Many (`match`, `finish`): for each distance d, the runs of equal tokens at i and i - d, new i only. The match of i
// ends where the furthest of the runs that begin at i or before ends. Then the phrases are a chain, which is followed
// by doubling jumps.
#include <algorithm>
#include <type_traits>

#include "cuda/backend.h"
#include "cuda/cluster.cuh"
#include "cuda/launch.cuh"
#include "cuda/lz77_runs.h"
#include "cuda/pages.cuh"
#include "lz77_state.h"

namespace lil::cuda {
namespace {

constexpr uint32_t kAll = ~0u;

// A sequence's state on CUDA: an occurrence bit for each place before the pending phrase, and, while tokens are
// appended, where the run that lasts to the end began, for each distance.
class Row : public lz77::State {
 public:
  int32_t old, count, end;  // tokens so far, to come, and then
  int32_t phrase;           // where the pending phrase starts
  bool good;

  __device__ Row(const Lz77AppendParams& p, int64_t b, Finding& finding)
      : State(p.state + b * p.state_size, p.state_size), p_(p), b_(b) {
    const int64_t given = p.counts ? p.counts[b] : p.max_tokens;
    sane_ = valid();
    old = num_tokens();
    finding.note(!sane_, Wrong::kState, old, 0);
    finding.note(given < 0 || given > p.max_tokens, Wrong::kTokenCounts, static_cast<int32_t>(given), p.max_tokens);
    finding.note(old + given > capacity(), Wrong::kRoom, static_cast<int32_t>(capacity()), old + given);
    good = finding.wrong == Wrong::kNothing;
    count = good ? static_cast<int32_t>(given) : 0;
    end = old + count;
    phrase = header_->phrase;
  }

  __device__ uint32_t* occurrences() const { return reinterpret_cast<uint32_t*>(kept_); }
  __device__ int32_t* run_starts() const { return kept_ + capacity_; }
  __device__ int32_t* tokens() const { return tokens_; }

  __device__ int64_t new_token(int32_t t) const {
    const int64_t at = b_ * p_.tokens_stride_b + t;
    return p_.tokens_int64 ? static_cast<const int64_t*>(p_.tokens)[at] : static_cast<const int32_t*>(p_.tokens)[at];
  }

  // Those in the state, and those to come.
  __device__ int32_t token(int32_t i) const { return i < old ? tokens_[i] : static_cast<int32_t>(new_token(i - old)); }

  __device__ int64_t checked_token(Finding& finding, int32_t t) const {
    const int64_t token = new_token(t);
    const int64_t shown = token < INT32_MIN ? INT32_MIN : token > INT32_MAX ? INT32_MAX : token;
    finding.note(token < 0 || token >= p_.vocab_size, Wrong::kTokens, static_cast<int32_t>(shown), p_.vocab_size - 1);
    return token;
  }

  // Bits of the pending phrase's first `length` tokens' occurrences among the places of a word; for all lanes. For the
  // occurrences of a state that has a tree instead.
  __device__ uint32_t search(int32_t word, int32_t length) const {
    const int32_t place = 32 * word + threadIdx.x % 32;
    int32_t same = place < phrase ? 0 : -1;
    while (same >= 0 && same < length) same = tokens_[place + same] == tokens_[phrase + same] ? same + 1 : -1;
    return __ballot_sync(kAll, same == length);
  }
  __device__ bool must_search() const { return old > phrase && !keeps(lz77::Kept::kOccurrences); }

  // Ends the call: a header with this many complete phrases and bits, and a pending phrase from `start` on.
  __device__ void commit(int32_t start, int32_t phrases, int32_t bits) const {
    *header_ = {end, 0, 0, 0, start, phrases, bits, seal(lz77::Kept::kOccurrences)};
  }
  __device__ const lz77::Header& header() const { return *header_; }

  __device__ void return_size() const {
    const int32_t token_bits = lz77::index_bits(p_.vocab_size);
    p_.phrases[b_] = sane_ ? phrases() : 0;
    p_.bits[b_] = sane_ ? bits(token_bits) : 0;
  }

 private:
  const Lz77AppendParams& p_;
  int64_t b_;
  bool sane_;
};

// --- A few tokens ----------------------------------------------------------------------------------------------------

constexpr int kStepTokens = 8;  // more go the other way
constexpr int kStepThreads = 1024, kStepWarps = kStepThreads / 32, kMaxParts = 8;
constexpr int kBatch = 16;  // words of a warp: so many loads are on their way at once

// Of the places in words first, ..., first + kBatch - 1 where `length` tokens of the phrase occur (all places, if it
// has none yet), keeps those where `token` comes next. Whether there is one.
__device__ bool keep(const Row& row, int32_t phrase, int32_t first, int32_t length, int32_t token) {
  const int32_t lane = threadIdx.x % 32, word = first + lane;
  uint32_t before = 0;
  if (lane < kBatch && 32 * word < phrase) {
    before = length > 0 ? row.occurrences()[word] : kAll;
    if (32 * word + 32 > phrase) before &= (1u << phrase % 32) - 1;
  }
  if (!__any_sync(kAll, before)) return false;
  int32_t next[kBatch];
#pragma unroll
  for (int k = 0; k < kBatch; ++k) {
    const bool here = __shfl_sync(kAll, before, k) >> lane & 1;
    next[k] = here ? row.tokens()[32 * (first + k) + lane + length] : -1;
  }
  uint32_t after = 0;
#pragma unroll
  for (int k = 0; k < kBatch; ++k) {
    const uint32_t kept = __ballot_sync(kAll, next[k] == token);
    if (lane == k) after = kept;
  }
  if (lane < kBatch && 32 * word < phrase && (length == 0 || after != before)) row.occurrences()[word] = after;
  return __any_sync(kAll, after);
}

// A sequence's words are spread over `parts` blocks, a cluster if there are several.
__global__ void __launch_bounds__(kStepThreads)
    step(const __grid_constant__ Lz77AppendParams p, ErrorWord* errors, int32_t parts) {
  __shared__ int32_t fresh[kStepTokens];
  __shared__ bool found[kStepTokens][kMaxParts];
  if (parts > 1) cluster_arrive();
  const int32_t b = blockIdx.x / parts, part = blockIdx.x % parts, thread = threadIdx.x;
  wait_for_previous();
  let_next_start();
  Finding finding;
  const Row row(p, b, finding);
  int32_t phrase = row.phrase, end = row.old, phrases = row.header().phrases, bits = row.header().bits;
  const bool must_search = row.must_search();
  if (thread < row.count) fresh[thread] = static_cast<int32_t>(row.checked_token(finding, thread));
  const bool good = !__syncthreads_or(finding.wrong != Wrong::kNothing);
  if (parts > 1) cluster_wait();
  if (good && row.count > 0) {
    // Each block for itself, which the others' equal values do not disturb.
    if (thread < row.count) row.tokens()[row.old + thread] = fresh[thread];
    __syncthreads();
    for (int32_t t = 0; t < row.count; ++t) {
      bool any = false;
      const int32_t stride = parts * kStepWarps * kBatch;
      for (int32_t first = (part * kStepWarps + thread / 32) * kBatch; 32 * first < phrase; first += stride) {
        if (t == 0 && must_search) {
          for (int32_t word = first; word < first + kBatch && 32 * word < phrase; ++word) {
            const uint32_t here = row.search(word, end - phrase);
            if (thread % 32 == 0) row.occurrences()[word] = here;
          }
          __syncwarp();
        }
        any |= keep(row, phrase, first, end - phrase, fresh[t]);
      }
      any = __syncthreads_or(any);
      if (parts > 1) {
        if (thread < parts) remote_store(&found[t][part], thread, any);
        cluster_arrive_release();
        cluster_wait();
        for (int32_t i = 0; i < parts; ++i) any |= found[t][i];
      }
      ++end;
      if (!any) {
        bits += lz77::State::phrase_bits(phrase, end - phrase, lz77::index_bits(p.vocab_size));
        ++phrases;
        phrase = end;
      }
    }
    if (part == 0 && thread == 0) row.commit(phrase, phrases, bits);
  }
  if (part == 0 && thread == 0) row.return_size();
  if (part == 0) finding.report(errors, Op::kLz77Append, b);
}

// --- Many tokens -----------------------------------------------------------------------------------------------------

// Scratch of one row, max_tokens + 1 ints: where the match of the pending phrase ends, or kBad, and, for each new
// position, where the furthest run that begins there does. 0: nothing known.
constexpr int32_t kBad = -1;

__device__ int32_t* match_ends(const Lz77AppendParams& p, int32_t* scratch, int64_t b) {
  return scratch + b * (p.max_tokens + 1);
}

constexpr int kBeginThreads = 1024;

__global__ void __launch_bounds__(kBeginThreads)
    begin(const __grid_constant__ Lz77AppendParams p, int32_t* scratch, ErrorWord* errors) {
  wait_for_previous();
  let_next_start();
  const int32_t b = blockIdx.x;
  Finding finding;
  const Row row(p, b, finding);
  int32_t* const ends = match_ends(p, scratch, b);
  for (int32_t t = threadIdx.x; t < row.count; t += kBeginThreads) {
    row.checked_token(finding, t);
    ends[1 + t] = 0;
  }
  const bool good = !__syncthreads_or(finding.wrong != Wrong::kNothing);
  if (threadIdx.x == 0) ends[0] = good ? 0 : kBad;
  finding.report(errors, Op::kLz77Append, b);
  if (!good || row.count == 0 || !row.must_search()) return;
  for (int32_t word = threadIdx.x / 32; 32 * word < row.phrase; word += kBeginThreads / 32) {
    const uint32_t here = row.search(word, row.old - row.phrase);
    if (threadIdx.x % 32 == 0) row.occurrences()[word] = here;
  }
}

constexpr int kMatchWarps = 8, kMatchThreads = 32 * kMatchWarps;
constexpr int kTile = 32;  // words of 32 positions between two barriers

// Bit c of lane r becomes bit r of lane c.
__device__ uint32_t transpose(uint32_t bits) {
  const int32_t lane = threadIdx.x % 32;
  uint32_t low = 0x0000ffff;
#pragma unroll
  for (int32_t m = 16; m > 0; m /= 2, low ^= low << m) {
    const uint32_t other = __shfl_xor_sync(kAll, bits, m);
    bits = lane & m ? (bits & ~low) | (other & ~low) >> m : (bits & low) | (other & low) << m;
  }
  return bits;
}

// Tokens as bits: word k of a place has bit k of 32 tokens. So 32 pairs of tokens are compared by an operation a bit.
template <int kPlanes>
struct Tile {
  static constexpr int kVectors = kPlanes / 4;

  uint4 near[kTile][kVectors];                   // the positions i, and
  uint4 far[kTile + kMatchWarps][kVectors];      // i - d
  int32_t ends[32 * kTile], loaded[32 * kTile];  // of the best runs known, now and at the start
  Known known[kTile];

  // New tokens are below 2^kPlanes - 1, so that old ones above (of another vocab_size) can be told from them. Returns
  // to each lane whether its plane is of the vectors behind the first and has bits.
  __device__ static bool load(uint4 (&to)[kVectors], const Row& row, int32_t word) {
    const int32_t lane = threadIdx.x % 32, i = 32 * word + lane;
    const uint32_t token = i >= 0 && i < row.end ? row.token(i) : 0;
    const uint32_t plane = transpose(static_cast<uint64_t>(token) >> kPlanes ? kAll : token);
    if (lane < kPlanes) reinterpret_cast<uint32_t*>(to)[lane] = plane;
    return lane >= 4 && plane != 0;
  }
};

// Bits in which 32 tokens differ from those that precede them by the lane's distance: a vector of planes.
// `low` becomes `high`.
__device__ uint32_t differing(uint4 near, uint4 high, uint4& low) {
  const int32_t lane = threadIdx.x % 32;
  const uint32_t differ =
      (near.x ^ __funnelshift_l(low.x, high.x, lane)) | (near.y ^ __funnelshift_l(low.y, high.y, lane)) |
      (near.z ^ __funnelshift_l(low.z, high.z, lane)) | (near.w ^ __funnelshift_l(low.w, high.w, lane));
  low = high;
  return differ;
}

// A warp has 32 distances, a lane each, and goes through the new positions; the warps of a block are neighbours.
// `pending`: the furthest end of a run that covers the pending phrase so far.
template <int kPlanes>
__device__ void match_distances(const Row& row, int32_t* ends, int32_t block, Tile<kPlanes>& tile, int32_t& pending) {
  constexpr int kVectors = Tile<kPlanes>::kVectors;
  const int32_t lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int32_t first_group = block * kMatchWarps, group = first_group + warp, distance = 32 * group + lane;
  const int32_t first_word = max(row.old / 32, first_group), last_word = (row.end - 1) / 32;
  int32_t tile_start = 32 * first_word;
  const auto found = [&](int32_t start, int32_t end) {
    if (start < row.old) {
      if (end > pending) atomicMax(&pending, end);
    } else if (start >= tile_start) {
      if (end > tile.ends[start - tile_start]) atomicMax(&tile.ends[start - tile_start], end);
    } else {
      int32_t* const there = ends + 1 + start - row.old;
      if (end > __ldcg(there)) atomicMax(there, end);
    }
  };
  Diagonal diagonal;
  const int32_t place = row.phrase - distance;
  if (row.old > row.phrase && distance > 0 && place >= 0 && row.occurrences()[place / 32] >> place % 32 & 1) {
    diagonal.enter(row.phrase);
  }
  Known before{0, 32};
  uint32_t equal = 0;
  for (int32_t word = first_word; word <= last_word;) {
    const int32_t words = min(kTile, last_word + 1 - word);
    tile_start = 32 * word;
    bool wide = false;
    for (int32_t k = warp; k < words; k += kMatchWarps) wide |= tile.load(tile.near[k], row, word + k);
    for (int32_t k = warp; k < words + kMatchWarps; k += kMatchWarps) {
      wide |= tile.load(tile.far[k], row, word - first_group - kMatchWarps + k);
    }
    for (int32_t k = warp; k < words; k += kMatchWarps) {
      const int32_t i = tile_start + 32 * k + lane;
      const bool is_new = i >= row.old && i < row.end;
      int32_t reach = is_new ? __ldcg(ends + 1 + i - row.old) : 0;
#pragma unroll
      for (int m = 1; m < 32; m *= 2) {
        const int32_t other = __shfl_up_sync(kAll, reach, m);
        if (lane >= m) reach = max(reach, other);
      }
      tile.ends[32 * k + lane] = tile.loaded[32 * k + lane] = reach;
      const uint32_t unmatched = __ballot_sync(kAll, is_new && reach <= i);
      const int32_t least = __reduce_min_sync(kAll, is_new && reach > i ? min(reach - i + 1, 32) : 32);
      if (lane == 0) tile.known[k] = {unmatched, least};
    }
    // Only the first of the vectors where all tokens of the tile are below 16.
    const auto compare = [&](auto vectors) {
      uint4 low[vectors];
#pragma unroll
      for (int v = 0; v < vectors; ++v) low[v] = tile.far[kMatchWarps - 1 - warp][v];
      for (int32_t k = 0; k < words; ++k, ++word) {
        uint32_t differ = distance == 0 ? kAll : 0, last = 1u << 31;
#pragma unroll
        for (int v = 0; v < vectors; ++v) {
          differ |= differing(tile.near[k][v], tile.far[kMatchWarps + k - warp][v], low[v]);
        }
        equal = ~differ;
        if (word <= group || word == first_word || word == last_word) {
          if (word <= group) equal = word < group ? 0 : equal & kAll << lane;  // i >= distance
          if (word == row.old / 32) {
            const uint32_t old = (1u << row.old % 32) - 1;
            equal = diagonal.in_run() ? equal | old : equal & ~old;
          }
          if (word == last_word) {
            last = 1u << (row.end - 1) % 32;
            equal &= last | (last - 1);
          }
        }
        const Known known = tile.known[k];
        diagonal.step(equal, 32 * word, before, known, last, found);
        before = known;
      }
    };
    if (__syncthreads_or(wide)) {
      compare(std::integral_constant<int, kVectors>{});
    } else {
      compare(std::integral_constant<int, 1>{});
    }
    __syncthreads();
    for (int32_t k = warp; k < words; k += kMatchWarps) {
      const int32_t at = 32 * k + lane, reach = tile.ends[at];
      if (reach > tile.loaded[at]) atomicMax(ends + 1 + tile_start + at - row.old, reach);
    }
  }
  tile_start = 32 * (last_word + 1);
  if (diagonal.in_run()) found(diagonal.run_start(), row.end);  // no word was there to end it
  if (distance > 0 && distance < row.end) {
    row.run_starts()[distance] = equal >> (row.end - 1) % 32 & 1 ? diagonal.run_start() : row.end;
  }
}

// Small distances have more positions than large ones: of every two blocks that an SM is likely to get, one is early
// and one late in its wave. The rows take turns, so that a block knows the matches that its row's earlier ones have
// found.
template <int kPlanes>
__global__ void __launch_bounds__(kMatchThreads, kPlanes <= 16 ? 3 : 2)
    match(const __grid_constant__ Lz77AppendParams p, int32_t* scratch, int32_t sms) {
  __shared__ Tile<kPlanes> tile;
  __shared__ int32_t pending;
  const int32_t batch = static_cast<int32_t>(p.batch), b = blockIdx.x % batch, turn = blockIdx.x / batch;
  const int32_t wave = turn / sms, block = wave * sms + (wave % 2 ? sms - 1 - turn % sms : turn % sms);
  wait_for_previous();
  let_next_start();
  Finding finding;
  const Row row(p, b, finding);
  int32_t* const ends = match_ends(p, scratch, b);
  if (row.count == 0 || block * kMatchThreads >= row.end || __ldcg(ends) == kBad) return;
  if (threadIdx.x == 0) pending = 0;
  match_distances(row, ends, block, tile, pending);
  __syncthreads();
  if (threadIdx.x == 0 && pending > 0) atomicMax(ends, pending);
}

constexpr int kFinishThreads = 1024, kFinishWarps = kFinishThreads / 32;
constexpr int kSpan = 2 * kFinishThreads;  // positions whose phrases are chained at once

// From a position of a span: where so many phrases later another begins, and their bits.
struct Jump {
  int32_t next, phrases, bits;
};

// The largest value of this thread and those before it, and of `before`.
__device__ int32_t prefix_max(int32_t value, int32_t before, int32_t* of_warps) {
  const int32_t lane = threadIdx.x % 32, warp = threadIdx.x / 32;
#pragma unroll
  for (int m = 1; m < 32; m *= 2) {
    const int32_t other = __shfl_up_sync(kAll, value, m);
    if (lane >= m) value = max(value, other);
  }
  if (lane == 31) of_warps[warp] = value;
  __syncthreads();
  const int32_t earlier = __reduce_max_sync(kAll, lane < warp ? of_warps[lane] : before);
  __syncthreads();
  return max(value, earlier);
}

__global__ void __launch_bounds__(kFinishThreads, 1)
    finish(const __grid_constant__ Lz77AppendParams p, int32_t* scratch) {
  __shared__ Jump jumps[kSpan];
  __shared__ int32_t of_warps[kFinishWarps];
  const int32_t b = blockIdx.x, thread = threadIdx.x, token_bits = lz77::index_bits(p.vocab_size);
  wait_for_previous();
  let_next_start();
  Finding finding;
  const Row row(p, b, finding);
  const int32_t* const ends = match_ends(p, scratch, b);
  if (row.count == 0 || ends[0] == kBad) {
    if (thread == 0) row.return_size();
    return;
  }
  for (int32_t t = thread; t < row.count; t += kFinishThreads) {
    row.tokens()[row.old + t] = static_cast<int32_t>(row.new_token(t));
  }
  int32_t at = row.phrase, phrases = row.header().phrases, bits = row.header().bits;
  if (at < row.old) {
    const int32_t match_end = max(ends[0], row.old);
    if (match_end < row.end) {
      ++phrases;
      bits += row.phrase_bits(at, match_end + 1 - at, token_bits);
      at = match_end + 1;
    }
  }
  // `at`: where a phrase begins. It stays behind a span's end only if that phrase is the pending one.
  int32_t reach = 0;
  for (int32_t first = row.old; first < row.end && at >= first; first += kSpan) {
    const int32_t span = min(kSpan, row.end - first);
    int32_t match_end[2];
    for (int s = 0; s < 2; ++s) {
      const int32_t t = 2 * thread + s;
      match_end[s] = t < span ? ends[1 + first + t - row.old] : 0;
    }
    match_end[1] = prefix_max(max(match_end[0], match_end[1]), reach, of_warps);
    const int32_t earlier = __shfl_up_sync(kAll, match_end[1], 1);
    if (thread % 32 == 31) of_warps[thread / 32] = match_end[1];
    __syncthreads();
    const int32_t left = thread % 32 ? earlier : thread ? of_warps[thread / 32 - 1] : reach;
    reach = of_warps[kFinishWarps - 1];
    match_end[0] = max(match_end[0], left);
    if (at < first + span) {
      for (int s = 0; s < 2; ++s) {
        const int32_t i = first + 2 * thread + s, stop = max(match_end[s], i);
        const bool ends_here = stop < row.end;
        jumps[2 * thread + s] = {(ends_here ? stop + 1 : i) - first, ends_here,
                                 ends_here ? row.phrase_bits(i, stop + 1 - i, token_bits) : 0};
      }
      __syncthreads();
      for (int32_t jumped = 1; jumped < span; jumped *= 2) {
        Jump mine[2];
        for (int s = 0; s < 2; ++s) {
          mine[s] = jumps[2 * thread + s];
          if (mine[s].next < span) {
            const Jump then = jumps[mine[s].next];
            mine[s] = {then.next, mine[s].phrases + then.phrases, mine[s].bits + then.bits};
          }
        }
        __syncthreads();
        for (int s = 0; s < 2; ++s) jumps[2 * thread + s] = mine[s];
        __syncthreads();
      }
      const Jump all = jumps[at - first];
      at = first + all.next;
      phrases += all.phrases;
      bits += all.bits;
    }
    __syncthreads();
  }
  if (at < row.end) {
    const int32_t* const starts = row.run_starts();
    const int32_t words = (at + 31) / 32;
#pragma unroll 4
    for (int32_t word = thread / 32; word < words; word += kFinishWarps) {
      const int32_t place = 32 * word + thread % 32;
      const uint32_t here = __ballot_sync(kAll, place < at && starts[at - place] <= at);
      if (thread % 32 == 0) row.occurrences()[word] = here;
    }
  }
  __syncthreads();
  if (thread == 0) {
    row.commit(at, phrases, bits);
    row.return_size();
  }
}

template <class... Args>
void launch_match(const Launch& launch, dim3 grid, int64_t vocab_size, const Args&... args) {
  const int32_t bits = lz77::index_bits(vocab_size + 1);
  const auto kernel = bits <= 8 ? match<8> : bits <= 16 ? match<16> : bits <= 20 ? match<20> : match<32>;
  launch(kernel, grid, kMatchThreads, 0, 1, args...);
}

// How many blocks share a sequence's step: as long as every warp has work, and each block an SM to itself.
int32_t parts_of(const Lz77AppendParams& p, int64_t capacity) {
  constexpr int64_t kPlaces = 32 * kBatch * kStepWarps;
  const Device& device = current_device();
  int32_t parts = 1;
  while (device.major >= 9 && parts < kMaxParts && parts * kPlaces < capacity && 2 * parts * p.batch <= device.sms) {
    parts *= 2;
  }
  return parts;
}

}  // namespace

void lz77_append(const Lz77AppendParams& p, const Tensor& on) {
  const Launch launch(on);
  const int64_t capacity = p.state_size / lz77::kTokenWords - 1;
  if (p.max_tokens <= kStepTokens) {
    const int32_t parts = parts_of(p, capacity);
    return launch(step, dim3(p.batch * parts), kStepThreads, 0, parts, p, error_word(), parts);
  }
  Tensor scratch = torch::stable::new_empty(on, {p.batch, p.max_tokens + 1}, ScalarType::Int);
  int32_t* const ends = static_cast<int32_t*>(scratch.mutable_data_ptr());
  const int64_t sms = current_device().sms, distances = std::min(capacity, lz77::kMaxCapacity);
  const int64_t blocks = (distances + kMatchThreads - 1) / kMatchThreads, turns = (blocks + sms - 1) / sms * sms;
  launch(begin, dim3(p.batch), kBeginThreads, 0, 1, p, ends, error_word());
  launch_match(launch, dim3(turns * p.batch), p.vocab_size, p, ends, static_cast<int32_t>(sms));
  launch(finish, dim3(p.batch), kFinishThreads, 0, 1, p, ends);
}

}  // namespace lil::cuda

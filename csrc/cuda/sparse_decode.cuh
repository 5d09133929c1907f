// sparse_decode. The list of pages one (sequence, KV head) reads is cut into tiles of 16 tokens and the tiles into
// splits, one block each; warps take tiles in turn with an online softmax of their own. Warps merge in shared memory,
// then the blocks of a head, which are one cluster, through each other's shared memory: no second kernel, no
// workspace, no counter. Where a list takes more splits than a cluster has blocks, or the device has no clusters, a
// second kernel merges what the blocks left in a scratch tensor.
//
// How tiles fall to splits and warps depends on the number of tiles, never on capacities: so a list of all pages gives
// the bits that reading everything gives, and a captured graph stays right while lengths grow.
#pragma once

#include <cooperative_groups.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>

#include "cuda/backend.h"
#include "cuda/instances.h"
#include "cuda/numbers.cuh"
#include "cuda/select_pages.cuh"

namespace lil::cuda {

constexpr int kTile = 16;       // tokens a warp takes at a time
constexpr int kTileHeads = 8;   // query heads of one product
constexpr int kSplitTiles = 8;   // a split of a short list
constexpr int kMaxCluster = 8;   // splits that one cluster holds on every device that has clusters
constexpr int kLongTiles = 32;   // a split of a list so long that it takes more
constexpr float kLog2E = 1.44269504088896340736f;

// Where two half tiles of 8 tokens lie (a page has at least 8) and which of their tokens take part.
struct TilePlace {
  int64_t k[2], v[2];    // elements from the buffers' start to the half's first row
  int32_t low[2], high[2];  // valid tokens of the half: low <= t < high

  __device__ bool valid(int half, int32_t t) const { return t >= low[half] && t < high[half]; }
};

// One (sequence, KV head): its list of pages, and the tiles it makes.
struct PageList {
  const int32_t* pages;  // null: every page in order
  int32_t b, h, entries, length, start;  // tokens [start, length) may be read

  __device__ int32_t tiles(const SparseDecodeParams& p) const {
    return static_cast<int32_t>((static_cast<int64_t>(entries) * p.cache.page_size + kTile - 1) / kTile);
  }

  __device__ TilePlace place(const SparseDecodeParams& p, int32_t tile, ErrorWord* errors) const {
    const int32_t page_size = static_cast<int32_t>(p.cache.page_size);
    TilePlace place{};
    int32_t last_entry = -1, physical = -1, page = -1;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int64_t token = static_cast<int64_t>(tile) * kTile + 8 * half;  // counted along the list
      const int32_t entry = static_cast<int32_t>(token / page_size), slot = static_cast<int32_t>(token % page_size);
      if (entry >= entries) continue;
      if (entry != last_entry) {
        last_entry = entry;
        page = pages ? pages[entry] : entry;
        physical = -1;
        if (page < -1 || page * static_cast<int64_t>(page_size) >= length) {
          report(errors, Op::kSparseDecode, Wrong::kPages, b, page, ceil_div(length, page_size) - 1);
        } else if (page >= 0) {
          physical = checked_page(Op::kSparseDecode, p.table, b, h, page, p.cache.num_pages, errors);
        }
      }
      if (physical < 0) continue;
      const auto offset = [&](const PagedBuffer& buffer) {
        return physical * buffer.stride_page + h * buffer.stride_head + slot * buffer.stride_token;
      };
      const int32_t position = page * page_size + slot;
      place.k[half] = offset(p.cache.k);
      place.v[half] = offset(p.cache.v);
      place.low[half] = max(0, start - position);
      place.high[half] = min(8, length - position);
    }
    return place;
  }
};

// An engine computes a warp's part: logits of a tile for kHeads query heads, and the weighted sum of its values. Lane
// (n, c) holds logits of tokens n (0, 1) and n + 8 (2, 3) for heads 2c and 2c + 1 of each block of eight.

// In fp32 on plain cores, for fp32 caches and for queries of another dtype than the cache.
template <class T>
struct FmaEngine {
  static constexpr int kHeads = kTileHeads, kMaxHeadDim = 256, kColumns = kMaxHeadDim / 32;
  static constexpr size_t kQueryBytes = kHeads * kMaxHeadDim * sizeof(float);

  const float* query;  // [kHeads][head_dim]
  int32_t head_dim;
  TilePlace k_place, v_place;
  const T *k_data, *v_data;
  int64_t k_stride, v_stride;
  float acc[kHeads][kColumns];  // lane: elements lane, lane + 32, ...

  __device__ static void stage_queries(const SparseDecodeParams& p, int32_t b, int32_t h, int32_t first_head,
                                       void* shared) {
    const int32_t head_dim = static_cast<int32_t>(p.cache.head_dim);
    for (int32_t i = threadIdx.x; i < kHeads * head_dim; i += blockDim.x) {
      const int32_t g = first_head + i / head_dim;
      static_cast<float*>(shared)[i] =
          g < p.group
              ? load_float(p.q, p.q_dtype, b * p.q_stride_b + (h * p.group + g) * p.q_stride_h + i % head_dim)
              : 0;
    }
  }

  __device__ FmaEngine(const SparseDecodeParams& p, const void* shared)
      : query(static_cast<const float*>(shared)),
        head_dim(static_cast<int32_t>(p.cache.head_dim)),
        k_data(static_cast<const T*>(p.cache.k.data)),
        v_data(static_cast<const T*>(p.cache.v.data)),
        k_stride(p.cache.k.stride_token),
        v_stride(p.cache.v.stride_token) {
    for (auto& head : acc) {
      for (float& a : head) a = 0;
    }
  }

  __device__ void load_k(const SparseDecodeParams&, const TilePlace& place) { k_place = place; }
  __device__ void load_v(const SparseDecodeParams&, const TilePlace& place) { v_place = place; }

  __device__ void logits(float (&s)[1][4]) const {
    const int32_t n = threadIdx.x % 32 / 4, c = threadIdx.x % 4;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float sum[2] = {0, 0};
      if (k_place.valid(half, n)) {
        const T* const row = k_data + k_place.k[half] + n * k_stride;
        const float* const q = query + 2 * c * head_dim;
#pragma unroll 4
        for (int32_t d = 0; d < head_dim; ++d) {
          const float x = to_float(row[d]);
          sum[0] = fmaf(x, q[d], sum[0]);
          sum[1] = fmaf(x, q[head_dim + d], sum[1]);
        }
      }
      s[0][2 * half] = sum[0], s[0][2 * half + 1] = sum[1];
    }
  }

  __device__ void weigh(const float (&s)[1][4], const float (&decay)[1][2]) {
    const int32_t lane = threadIdx.x % 32;
#pragma unroll
    for (int g = 0; g < kHeads; ++g) {
      const float factor = __shfl_sync(~0u, decay[0][g % 2], g / 2);
#pragma unroll
      for (float& a : acc[g]) a *= factor;
    }
#pragma unroll
    for (int half = 0; half < 2; ++half) {
#pragma unroll 1
      for (int t = 0; t < 8; ++t) {
        float weights[kHeads];
#pragma unroll
        for (int g = 0; g < kHeads; ++g) weights[g] = __shfl_sync(~0u, s[0][2 * half + g % 2], 4 * t + g / 2);
        if (!v_place.valid(half, t)) continue;
        const T* const row = v_data + v_place.v[half] + t * v_stride;
#pragma unroll
        for (int i = 0; i < kColumns; ++i) {
          if (lane + 32 * i < head_dim) {
            const float x = to_float(row[lane + 32 * i]);
#pragma unroll
            for (int g = 0; g < kHeads; ++g) acc[g][i] = fmaf(weights[g], x, acc[g][i]);
          }
        }
      }
    }
  }

  __device__ void store(float* out) const {
    const int32_t lane = threadIdx.x % 32;
#pragma unroll
    for (int g = 0; g < kHeads; ++g) {
#pragma unroll
      for (int i = 0; i < kColumns; ++i) {
        if (lane + 32 * i < head_dim) out[g * head_dim + lane + 32 * i] = acc[g][i];
      }
    }
  }
};

// Partial results of some warps or splits: for each head the maximum (of logits times log2 e), the sum of weights
// relative to it, and the weighted sum of values.
struct Partial {
  float *max, *sum, *acc;  // [heads], [heads], [heads][head_dim]
};

struct Merged {
  float max, sum, acc;
};

// One element over `count` partial results, in order; max(i), sum(i) and acc(i) read the i-th. Eight are read at a time,
// before any is used: their latencies overlap.
template <class Max, class Sum, class Acc>
__device__ inline Merged merge(int32_t count, Max max, Sum sum, Acc acc) {
  constexpr int32_t kAtOnce = 8;
  Merged all{-INFINITY, 0, 0};
  for (int32_t first = 0; first < count; first += kAtOnce) {
    float part_max[kAtOnce], part_sum[kAtOnce], part_acc[kAtOnce];
#pragma unroll
    for (int32_t i = 0; i < kAtOnce; ++i) {
      const bool there = first + i < count;
      part_max[i] = there ? max(first + i) : -INFINITY;
      part_sum[i] = there ? sum(first + i) : 0;
      part_acc[i] = there ? acc(first + i) : 0;
    }
    float high = all.max;
#pragma unroll
    for (int32_t i = 0; i < kAtOnce; ++i) high = fmaxf(high, part_max[i]);
    const float base = high == -INFINITY ? 0 : high;  // nothing read: the weights are 0 all the same
    const float decay = exp2f(all.max - base);
    all = {high, all.sum * decay, all.acc * decay};
#pragma unroll
    for (int32_t i = 0; i < kAtOnce; ++i) {
      const float weight = exp2f(part_max[i] - base);
      all.sum = fmaf(part_sum[i], weight, all.sum);
      all.acc = fmaf(part_acc[i], weight, all.acc);
    }
  }
  return all;
}

__device__ inline void write_result(const SparseDecodeParams& p, int64_t head, int32_t d, const Merged& all) {
  store_float(all.sum == 0 ? 0 : all.acc / all.sum, p.out, p.q_dtype, head * p.cache.head_dim + d);
  if (d == 0) p.lse[head] = all.sum == 0 ? -INFINITY : all.max / kLog2E + logf(all.sum);
}

// How many splits a list has. It follows from the list's tiles and from what the batch and the device give, never from
// capacities.
struct SplitPlan {
  int32_t warps, max_splits, head_blocks;

  // 32-bit words of shared memory for a list made here, a multiple of 16 bytes.
  __host__ __device__ static int64_t list_words(const SelectPagesParams& select) {
    return (select.capacity + 3) / 4 * 4;
  }

  __host__ __device__ int32_t splits(int32_t tiles) const {
    const int32_t few = (tiles + kSplitTiles - 1) / kSplitTiles, many = (tiles + kLongTiles - 1) / kLongTiles;
    const int32_t wanted = few <= kMaxCluster ? few : many > kMaxCluster ? many : kMaxCluster;
    return wanted < 1 ? 1 : wanted < max_splits ? wanted : max_splits;
  }
};

// Without clusters: [batch][kv_heads][head_blocks][splits] partial results.
struct Scratch {
  float* data;
  int32_t splits;

  __device__ Partial at(int64_t which, int32_t heads, int32_t head_dim) const {
    float* const max = data + which * heads * (head_dim + 2);
    return {max, max + heads, max + 2 * heads};
  }
};

// The first half of a cluster's barrier tells the others that this block runs: before that its memory must not be
// touched. The second half comes much later, when they surely do.
__device__ inline void cluster_arrive() {
#if __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory");
#endif
}
__device__ inline void cluster_wait() {
#if __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.wait.aligned;" ::: "memory");
#endif
}

template <class Engine>
__global__ void __launch_bounds__(256, 1)
    sparse_decode_kernel(const __grid_constant__ SparseDecodeParams p, const __grid_constant__ SelectPagesParams select,
                         const SplitPlan plan, const Scratch scratch, ErrorWord* errors) {
  constexpr int kHeads = Engine::kHeads, kBlocks = kHeads / kTileHeads;
  extern __shared__ uint4 shared[];
  const int32_t head_dim = static_cast<int32_t>(p.cache.head_dim), kv_heads = static_cast<int32_t>(p.cache.kv_heads);
  const int32_t split = blockIdx.x, h = blockIdx.y / plan.head_blocks, b = blockIdx.z;
  const int32_t first_head = blockIdx.y % plan.head_blocks * kHeads;
  const int32_t warp = threadIdx.x / 32, n = threadIdx.x % 32 / 4, c = threadIdx.x % 4;
  int32_t* const selected = reinterpret_cast<int32_t*>(reinterpret_cast<char*>(shared) + Engine::kQueryBytes);
  float* const partials = reinterpret_cast<float*>(selected + (select.scores ? plan.list_words(select) : 0));
  // Partial results of the warps, then of the block.
  const auto partial = [&](int32_t i) {
    float* const max = partials + i * kHeads * (head_dim + 2);
    return Partial{max, max + kHeads, max + 2 * kHeads};
  };
  const bool in_cluster = gridDim.x > 1 && scratch.data == nullptr;
  if (in_cluster) cluster_arrive();
  wait_for_previous();
  let_next_start();

  PageList list{p.pages ? p.pages + b * p.pages_stride_b + h * p.pages_stride_h : nullptr, b, h};
  list.length = checked_length(Op::kSparseDecode, p.seq_lens, b, p.table.max_pages * p.cache.page_size, errors);
  list.start = p.window > 0 && p.window < list.length ? list.length - static_cast<int32_t>(p.window) : 0;
  if (select.scores) {
    // Every block of the head selects for itself: cheaper than a launch, or than telling each other.
    __shared__ SelectScratch select_scratch;
    list.entries = ceil_div(list.length, static_cast<int32_t>(p.cache.page_size));
    if (list.entries > select.capacity) {
      select_pages_of(select_scratch, select, b, h, list.length, selected);
      list.entries = static_cast<int32_t>(select.capacity);
      list.pages = selected;
      __syncthreads();
    }
  } else if (!p.selected) {
    list.entries = ceil_div(list.length, static_cast<int32_t>(p.cache.page_size));
  } else {
    list.entries = p.counts ? p.counts[b * kv_heads + h] : static_cast<int32_t>(p.capacity);
    if (list.entries < 0 || list.entries > p.capacity) {
      report(errors, Op::kSparseDecode, Wrong::kCounts, b, list.entries, p.capacity);
      list.entries = 0;
    }
  }
  const int32_t tiles = list.tiles(p), per_split = ceil_div(tiles, plan.splits(tiles));
  const int32_t end = min(tiles, (split + 1) * per_split), warps = plan.warps;

  // The first tile's rows are on their way while the queries are staged.
  Engine engine(p, shared);
  int32_t tile = split * per_split + warp;
  TilePlace place{};
  if (tile < end) {
    place = list.place(p, tile, errors);
    engine.load_k(p, place);
  }
  Engine::stage_queries(p, b, h, first_head, shared);
  __syncthreads();
  float max[kBlocks][2], sum[kBlocks][2];
#pragma unroll
  for (int block = 0; block < kBlocks; ++block) {
    max[block][0] = max[block][1] = -INFINITY;
    sum[block][0] = sum[block][1] = 0;
  }
  if (tile < end) {
    while (true) {
      engine.load_v(p, place);
      const int32_t next_tile = tile + warps;
      TilePlace next{};
      if (next_tile < end) next = list.place(p, next_tile, errors);
      float s[kBlocks][4], decay[kBlocks][2];
      engine.logits(s);
      if (next_tile < end) engine.load_k(p, next);
#pragma unroll
      for (int block = 0; block < kBlocks; ++block) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          float logit = s[block][i] * p.scale;
          if (p.softcap > 0) logit = p.softcap * tanhf(logit / p.softcap);
          s[block][i] = place.valid(i / 2, n) ? logit * kLog2E : -INFINITY;
        }
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          float high = fmaxf(s[block][i], s[block][2 + i]);
          for (int32_t step = 4; step < 32; step *= 2) high = fmaxf(high, __shfl_xor_sync(~0u, high, step));
          high = fmaxf(high, max[block][i]);
          // Nothing read yet: any finite number does, for the weights are 0.
          const float base = high == -INFINITY ? 0 : high;
          decay[block][i] = exp2f(max[block][i] - base);
          s[block][i] = exp2f(s[block][i] - base);
          s[block][2 + i] = exp2f(s[block][2 + i] - base);
          sum[block][i] = sum[block][i] * decay[block][i] + s[block][i] + s[block][2 + i];
          max[block][i] = high;
        }
      }
      engine.weigh(s, decay);
      if (next_tile >= end) break;
      tile = next_tile;
      place = next;
    }
  }

  const Partial mine = partial(warp);
#pragma unroll
  for (int block = 0; block < kBlocks; ++block) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      for (int32_t step = 4; step < 32; step *= 2) sum[block][i] += __shfl_xor_sync(~0u, sum[block][i], step);
      if (n == 0) {
        mine.max[block * kTileHeads + 2 * c + i] = max[block][i];
        mine.sum[block * kTileHeads + 2 * c + i] = sum[block][i];
      }
    }
  }
  engine.store(mine.acc);
  __syncthreads();

  const int32_t heads = min(kHeads, static_cast<int32_t>(p.group) - first_head), elements = heads * head_dim;
  const int64_t first_row = (static_cast<int64_t>(b) * kv_heads + h) * p.group + first_head;
  const auto merge_warps = [&](int32_t i) {
    const int32_t g = i / head_dim;
    return merge(
        warps, [&](int32_t w) { return partial(w).max[g]; }, [&](int32_t w) { return partial(w).sum[g]; },
        [&](int32_t w) { return partial(w).acc[i]; });
  };
  if (gridDim.x == 1) {
    for (int32_t i = threadIdx.x; i < elements; i += blockDim.x) {
      write_result(p, first_row + i / head_dim, i % head_dim, merge_warps(i));
    }
    return;
  }
  if (scratch.data) {
    const int64_t which = (static_cast<int64_t>(b) * gridDim.y + blockIdx.y) * gridDim.x + split;
    const Partial block = scratch.at(which, kHeads, head_dim);
    for (int32_t i = threadIdx.x; i < elements; i += blockDim.x) {
      const Merged all = merge_warps(i);
      block.acc[i] = all.acc;
      if (i % head_dim == 0) block.max[i / head_dim] = all.max, block.sum[i / head_dim] = all.sum;
    }
    return;
  }
#if __CUDA_ARCH__ >= 900
  // Every block owns a share of the elements. The others send it theirs, so that after one barrier all is at hand and
  // nobody needs another's memory any more.
  const auto cluster = cooperative_groups::this_cluster();
  const int32_t splits = gridDim.x, share = ceil_div(elements, splits);
  float* const inbox = partial(warps).max;  // [splits][heads] maxima, then sums, then [splits][share] elements
  float *const inbox_sum = inbox + splits * kHeads, *const inbox_acc = inbox_sum + splits * kHeads;
  cluster_wait();
  for (int32_t i = threadIdx.x; i < elements; i += blockDim.x) {
    const Merged all = merge_warps(i);
    const int32_t owner = i / share;
    cluster.map_shared_rank(inbox_acc, owner)[split * share + i - owner * share] = all.acc;
    if (i % head_dim == 0) {
      for (int32_t other = 0; other < splits; ++other) {
        cluster.map_shared_rank(inbox, other)[split * kHeads + i / head_dim] = all.max;
        cluster.map_shared_rank(inbox_sum, other)[split * kHeads + i / head_dim] = all.sum;
      }
    }
  }
  cluster.sync();
  for (int32_t i = threadIdx.x; i < min(share, elements - split * share); i += blockDim.x) {
    const int32_t g = (split * share + i) / head_dim;
    const Merged all = merge(
        splits, [&](int32_t s) { return inbox[s * kHeads + g]; }, [&](int32_t s) { return inbox_sum[s * kHeads + g]; },
        [&](int32_t s) { return inbox_acc[s * share + i]; });
    write_result(p, first_row + g, (split * share + i) % head_dim, all);
  }
#endif
}

// Merges the splits where they could not be a cluster. Grid: [kv_heads * head_blocks, batch].
template <int Heads>
__global__ void sparse_decode_merge(const __grid_constant__ SparseDecodeParams p, const SplitPlan plan,
                                    const Scratch scratch) {
  const int32_t head_dim = static_cast<int32_t>(p.cache.head_dim);
  const int32_t h = blockIdx.x / plan.head_blocks, first_head = blockIdx.x % plan.head_blocks * Heads, b = blockIdx.y;
  const int32_t heads = min(Heads, static_cast<int32_t>(p.group) - first_head);
  const int64_t first = (static_cast<int64_t>(b) * gridDim.x + blockIdx.x) * scratch.splits;
  wait_for_previous();
  for (int32_t i = threadIdx.x; i < heads * head_dim; i += blockDim.x) {
    const int32_t g = i / head_dim;
    const auto part = [&](int32_t split) { return scratch.at(first + split, Heads, head_dim); };
    const Merged all = merge(
        scratch.splits, [&](int32_t s) { return part(s).max[g]; }, [&](int32_t s) { return part(s).sum[g]; },
        [&](int32_t s) { return part(s).acc[i]; });
    write_result(p, (static_cast<int64_t>(b) * p.cache.kv_heads + h) * p.group + first_head + g, i % head_dim, all);
  }
}

// select.scores is null where the list of pages is given, or is all of them.
template <class Engine>
void launch_sparse_decode(const SparseDecodeParams& p, const SelectPagesParams& select, const Launch& launch,
                          const Tensor& on) {
  SplitPlan plan{};
  plan.head_blocks = static_cast<int32_t>((p.group + Engine::kHeads - 1) / Engine::kHeads);
  const int64_t rows = p.batch * p.cache.kv_heads * plan.head_blocks, sms = current_device().sms;
  // A few heads alone take all the warps an SM can hold; otherwise two blocks of four warps share it.
  plan.warps = rows * kMaxCluster <= sms ? 8 : 4;
  plan.max_splits = static_cast<int32_t>(std::max<int64_t>(1, (plan.warps == 8 ? sms : 2 * sms) / rows));
  if (const char* e = std::getenv("LIL_TUNE")) {
    int w = 0, c = 0, per = 0;
    std::sscanf(e, "%d,%d,%d", &w, &c, &per);
    if (w) plan.warps = w;
    if (per) plan.max_splits = static_cast<int32_t>(std::max<int64_t>(1, per * sms / rows));
    if (c) plan.max_splits = std::min(plan.max_splits, c);
  }
  const int64_t pages = select.scores ? select.capacity : p.selected ? p.capacity : p.table.max_pages;
  const int64_t tiles = (pages * p.cache.page_size + kTile - 1) / kTile;
  const int32_t splits = plan.splits(static_cast<int32_t>(std::min<int64_t>(tiles, INT32_MAX)));

  const size_t partial = Engine::kHeads * (p.cache.head_dim + 2) * sizeof(float);
  const bool cluster = splits > 1 && splits <= kMaxCluster && current_device().major >= 9;
  const size_t inbox = (2 * splits * Engine::kHeads + Engine::kHeads * p.cache.head_dim + splits) * sizeof(float);
  const size_t list = select.scores ? plan.list_words(select) * sizeof(int32_t) : 0;
  const size_t shared = Engine::kQueryBytes + list + plan.warps * partial + (cluster ? inbox : 0);
  constexpr auto kernel = sparse_decode_kernel<Engine>;
  allow_shared<kernel>(shared);
  const dim3 grid(splits, p.cache.kv_heads * plan.head_blocks, p.batch);
  Scratch scratch{nullptr, splits};
  if (splits == 1 || cluster) {
    return launch(kernel, grid, 32 * plan.warps, shared, splits, p, select, plan, scratch, error_word());
  }
  const Tensor workspace =
      torch::stable::new_empty(on, {rows * splits * static_cast<int64_t>(partial / sizeof(float))}, ScalarType::Float);
  scratch.data = static_cast<float*>(workspace.mutable_data_ptr());
  launch(kernel, grid, 32 * plan.warps, shared, 1, p, select, plan, scratch, error_word());
  launch(sparse_decode_merge<Engine::kHeads>, dim3(grid.y, grid.z), 128, 0, 1, p, plan, scratch);
}

}  // namespace lil::cuda

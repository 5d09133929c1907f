// sparse_decode. The list of pages one (sequence, KV head) reads is cut into tiles of 16 tokens and the tiles into
// splits, one block each; warps take tiles in turn with an online softmax of their own. Warps merge in shared memory,
// then the blocks of a head, which are one cluster, through each other's shared memory: no second kernel, no
// workspace, no counter. Many heads have small clusters, so that all run at once. Where a list takes more splits than
// that, or the device has no clusters, a second kernel merges what the blocks left in a scratch tensor.
//
// How tiles fall to splits and warps depends on the number of tiles, never on capacities: so a list of all pages gives
// the bits that reading everything gives, and a captured graph stays right while lengths grow.
#pragma once

#include <algorithm>
#include <bit>

#include "cuda/backend.h"
#include "cuda/cluster.cuh"
#include "cuda/instances.h"
#include "cuda/loss.cuh"
#include "cuda/numbers.cuh"
#include "cuda/partial_results.cuh"
#include "cuda/select_pages.cuh"

namespace lil::cuda {

constexpr int kTile = 16;  // tokens a warp takes at a time
constexpr int kMaxHeadDim = 256;
constexpr int kMaxVectors = 512;  // of a head block: fours of its elements
constexpr int kTileHeads = 8;     // query heads of one product
constexpr int kSplitTiles = 8;    // a split of a short list
constexpr int kLongTiles = 32;    // a split of a list so long that it takes more

// Where the two halves of a tile lie, 8 tokens each (a page has at least 8), and which of the 16 take part.
struct TilePlace {
  int64_t k[2], v[2];            // elements from the head's first row of page 0 to the half's first row
  uint32_t tokens;               // bit t: token t
  float k_scale[2], v_scale[2];  // float8 only

  __device__ bool valid(int half, int32_t t) const { return tokens >> (8 * half + t) & 1; }
};

// One (sequence, KV head): its list of pages, and the tiles it makes. kOwn: the list was made here, in shared memory,
// of pages that there are.
template <bool kOwn>
struct PageList {
  const int32_t* pages;            // null, unless kOwn: every page in order
  const int32_t* table;            // the head's row of the page table
  int32_t entries, length, start;  // tokens [start, length) may be read

  __device__ int32_t tiles(PageSize page_size) const {
    return static_cast<int32_t>(((static_cast<int64_t>(entries) << page_size.shift) + kTile - 1) / kTile);
  }

  // The tokens of the half at `position` that take part, a bit each.
  __device__ uint32_t tokens_at(int32_t position) const {
    const int32_t low = min(8, max(0, start - position)), high = max(0, min(8, length - position));
    return ((1u << high) - 1) & ~((1u << low) - 1);
  }

  // kScaled: the pages' scales as well. Of a half of which no token takes part not even these may be looked at.
  template <bool kScaled>
  __device__ TilePlace place(const SparseDecodeParams& p, PageSize page_size, int32_t h, int32_t tile,
                             Finding& finding) const {
    TilePlace place{};
    const auto place_half = [&](int half, int32_t entry, int32_t slot) {
      if (entry >= entries) return;
      const int32_t page = kOwn || pages ? pages[entry] : entry;
      if constexpr (!kOwn) {
        const int32_t most = page_size.pages(length) - 1;
        finding.note(page < -1 || page > most, Wrong::kPages, page, most);
        if (page < 0 || page > most) return;
      }
      const int32_t physical = checked_entry(finding, table[page], p.cache.num_pages);
      const int32_t position = page_size.first(page) + slot;
      if (physical < 0) return;
      place.k[half] = physical * p.cache.k.stride_page + slot * p.cache.k.stride_token;
      place.v[half] = physical * p.cache.v.stride_page + slot * p.cache.v.stride_token;
      place.tokens |= tokens_at(position) << (8 * half);
      if (half == 0 && page_size.shift > 3) {  // both in one page
        place.k[1] = place.k[0] + 8 * p.cache.k.stride_token;
        place.v[1] = place.v[0] + 8 * p.cache.v.stride_token;
        place.tokens |= tokens_at(position + 8) << 8;
      }
      if constexpr (kScaled) {
#pragma unroll
        for (int i = half; i < 2; ++i) {
          if (!(place.tokens >> (8 * i) & 0xff)) continue;
          place.k_scale[i] = p.cache.k_scale.at(physical, h);
          place.v_scale[i] = p.cache.v_scale.at(physical, h);
        }
      }
    };
    const int32_t token = tile * kTile;  // counted along the list
    place_half(0, page_size.page(token), page_size.slot(token));
    if (page_size.shift == 3) place_half(1, page_size.page(token + 8), 0);
    return place;
  }
};

// An engine computes a warp's part: logits of a tile for kHeads query heads, and the weighted sum of its values. Lane
// (n, c) holds logits of tokens n (0, 1) and n + 8 (2, 3) for heads 2c and 2c + 1 of each block of eight.

// In fp32 on plain cores, for fp32 caches and for queries of another dtype than the cache.
template <class T>
struct FmaEngine {
  static constexpr int kHeads = kTileHeads, kColumns = kMaxHeadDim / 32;
  static constexpr bool kScaled = kIsFloat8<T>;
  static constexpr int kBlocksPerSm = 1;
  __device__ static int32_t head_dim_of(const SparseDecodeParams& p) { return static_cast<int32_t>(p.cache.head_dim); }
  __device__ static DType out_dtype(const SparseDecodeParams& p) { return p.q_dtype; }
  static constexpr size_t kQueryBytes = kHeads * kMaxHeadDim * sizeof(float);

  const float* query;  // [kHeads][head_dim]
  int32_t head_dim;
  TilePlace k_place, v_place;
  const T *k_data, *v_data;
  int64_t k_stride, v_stride;
  float acc[kHeads][kColumns];  // lane: elements lane, lane + 32, ...

  __device__ static void stage_queries(const SparseDecodeParams& p, int32_t b, int32_t h, int32_t first_head,
                                       void* shared) {
    const int32_t head_dim = head_dim_of(p);
#pragma unroll 1
    for (int32_t i = threadIdx.x; i < kHeads * head_dim; i += blockDim.x) {
      const int32_t g = first_head + i / head_dim;
      static_cast<float*>(shared)[i] =
          g < p.group ? load_float(p.q, p.q_dtype, b * p.q_stride_b + (h * p.group + g) * p.q_stride_h + i % head_dim)
                      : 0;
    }
  }

  __device__ FmaEngine(const SparseDecodeParams& p, int32_t h, const void* shared)
      : query(static_cast<const float*>(shared)),
        head_dim(static_cast<int32_t>(p.cache.head_dim)),
        k_data(static_cast<const T*>(p.cache.k.data) + h * p.cache.k.stride_head),
        v_data(static_cast<const T*>(p.cache.v.data) + h * p.cache.v.stride_head),
        k_stride(p.cache.k.stride_token),
        v_stride(p.cache.v.stride_token) {
    for (auto& head : acc) {
      for (float& a : head) a = 0;
    }
  }

  __device__ void load_k(const TilePlace& place) { k_place = place; }
  __device__ void load_v(const TilePlace& place) { v_place = place; }

  __device__ float logit_scale(const SparseDecodeParams& p, const TilePlace& place, int, int i) const {
    return kScaled ? p.scale * place.k_scale[i / 2] : p.scale;
  }

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

  __device__ void weigh(const float (&s)[1][4], const float (&decay)[1][2], const TilePlace&) {
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
            const float stored = to_float(row[lane + 32 * i]), x = kScaled ? stored * v_place.v_scale[half] : stored;
#pragma unroll
            for (int g = 0; g < kHeads; ++g) acc[g][i] = fmaf(weights[g], x, acc[g][i]);
          }
        }
      }
    }
  }

  __device__ void store(float* out, int32_t pitch) const {
    const int32_t lane = threadIdx.x % 32;
#pragma unroll
    for (int g = 0; g < kHeads; ++g) {
#pragma unroll
      for (int i = 0; i < kColumns; ++i) {
        if (lane + 32 * i < head_dim) out[g * pitch + lane + 32 * i] = acc[g][i];
      }
    }
  }
};

// `unread`: log2 of the sum of exponentials of what was not read, for the loss.
struct Unread {
  float* loss;  // null: not asked for
  float log2_sum;
};

// Elements d to d + 3 of one head.
__device__ inline void write_result(const SparseDecodeParams& p, DType dtype, int64_t head, int32_t d,
                                    const Merged& all, Unread unread) {
  const float scale = __fdividef(1, all.sum);
  float4 out{all.acc.x * scale, all.acc.y * scale, all.acc.z * scale, all.acc.w * scale};
  if (all.sum == 0) out = {0, 0, 0, 0};  // nothing weighs anything, not even NaN
  store_floats(out, p.out, dtype, head * p.cache.head_dim + d);
  if (d != 0) return;
  p.lse[head] = all.sum == 0 ? -INFINITY : all.max / kLog2E + __logf(all.sum);
  if (unread.loss) unread.loss[head] = lost_share(all.max, all.sum, unread.log2_sum);
}

// How many splits a list has. It follows from the list's tiles and from what the batch and the device give, never from
// capacities.
struct SplitPlan {
  int32_t warps, max_splits, head_blocks;
  int32_t cluster_splits;  // a short list takes no more: all heads' clusters of so many run at once
  int32_t parts_words;     // shared memory of the warps' results, which the keys of a selection have before
  int32_t share;           // of a head block's elements, four at a time, that each block of a cluster merges
  uint32_t to_block;       // which block that is: vector * to_block / 2^22, exact for kMaxVectors

  // 32-bit words of shared memory for a list made here, a multiple of 16 bytes.
  __host__ __device__ static int64_t list_words(const SelectPagesParams& select) {
    return (select.capacity + 3) / 4 * 4;
  }

  __host__ __device__ int32_t splits(int32_t tiles) const {
    const int32_t few = (tiles + kSplitTiles - 1) / kSplitTiles, many = (tiles + kLongTiles - 1) / kLongTiles;
    const int32_t most = many <= cluster_splits ? cluster_splits : many > kMaxCluster ? many : kMaxCluster;
    const int32_t wanted = few < most ? few : most;
    return wanted < 1 ? 1 : wanted < max_splits ? wanted : max_splits;
  }
};

// Logits of one tile, times log2 e, where the masses will be: tokens n and n + 8 of `token` for heads g and g + 1.
__device__ inline void store_logits(const SparseDecodeParams& p, const float (&s)[4], int64_t first_row, int32_t g,
                                    int64_t token) {
  const int64_t width = p.entries_capacity() * p.cache.page_size;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const int64_t at = token + 8 * (i / 2);
    if (g + i % 2 < p.group && at < width) p.token_mass[(first_row + g + i % 2) * width + at] = s[i];
  }
}

// kSelects: the list of pages is chosen here, from its scores. scratch: null, or room for the partial results of
// every split, which sparse_decode_merge then merges.
template <class Engine, bool kSelects>
__global__ void __launch_bounds__(256, Engine::kBlocksPerSm)
    sparse_decode_kernel(const __grid_constant__ SparseDecodeParams p, const __grid_constant__ Selecting selecting,
                         const SplitPlan plan, float* const scratch, ErrorWord* errors) {
  constexpr int kHeads = Engine::kHeads, kBlocks = kHeads / kTileHeads;
  static_assert(kHeads * (kHeads > kTileHeads ? kMaxHeadDim / 2 : kMaxHeadDim) / 4 <= kMaxVectors);
  extern __shared__ uint4 shared[];
  const SelectPagesParams& select = selecting.pages;
  const int32_t head_dim = Engine::head_dim_of(p), warps = blockDim.x / 32, splits = gridDim.x;
  const int32_t split = blockIdx.x, h = plan.head_blocks == 1 ? blockIdx.y : blockIdx.y / plan.head_blocks;
  const int32_t first_head = (blockIdx.y - h * plan.head_blocks) * kHeads, b = blockIdx.z;
  const int32_t warp = threadIdx.x / 32, n = threadIdx.x % 32 / 4, c = threadIdx.x % 4;
  int32_t* const selected = reinterpret_cast<int32_t*>(reinterpret_cast<char*>(shared) + Engine::kQueryBytes);
  float* const parts = reinterpret_cast<float*>(selected + (kSelects ? plan.list_words(select) : 0));
  // Every block of a cluster owns a share of the elements. The others send it theirs, so that nobody waits for more.
  const int32_t heads = min(kHeads, static_cast<int32_t>(p.group) - first_head), vectors = heads * head_dim / 4;
  __shared__ Barrier all_there;
  const Inbox inbox(parts + plan.parts_words, all_there, splits, plan.share);
  const bool in_cluster = splits > 1 && scratch == nullptr;
  if (in_cluster) {
    if (threadIdx.x == 0) inbox.expect(split, vectors);
    __syncwarp();
    cluster_arrive();
  }
  Finding finding;
  const PageSize page_size(p.cache.page_size);
  PageList<kSelects> list{nullptr, p.table.data + p.table.index(b, h, 0)};
  int32_t first_tile, end;
  const auto read_length = [&] {
    list.length = checked_length(finding, p.seq_lens, b, p.table.max_pages << page_size.shift);
    list.start = p.window > 0 && p.window < list.length ? list.length - static_cast<int32_t>(p.window) : 0;
    list.entries = page_size.pages(list.length);
  };
  const auto take_split = [&] {
    const int32_t tiles = list.tiles(page_size), per_split = ceil_div(tiles, plan.splits(tiles));
    first_tile = split * per_split;
    end = min(tiles, first_tile + per_split);
  };
  Engine engine(p, h, shared);
  __shared__ std::conditional_t<kSelects, SelectScratch, int> select_scratch;
  SelectKeys<true> left_out{};
  if constexpr (kSelects) {
    // Whoever scored has waited for what came before it. So all but its scores and the cache may be read before they
    // are there: queries, lengths, and the page table, which will be looked up in L1.
    Engine::stage_queries(p, b, h, first_head, shared);
    read_length();
    __syncwarp();
    if (in_cluster) cluster_wait();
    constexpr int32_t kLine = 128 / sizeof(int32_t);
#pragma unroll 1
    for (int32_t i = threadIdx.x * kLine; i < list.entries; i += blockDim.x * kLine) prefetch(list.table + i);
    list.pages = selected;
    const bool selects = list.entries > select.capacity;
    if (selects) list.entries = static_cast<int32_t>(select.capacity);
    for (int32_t i = threadIdx.x; !selects && i < list.entries; i += blockDim.x) selected[i] = i;
    take_split();
    wait_for_previous();
    let_next_start();
    // Every block of the head selects for itself: no launch more, and no list through memory.
    if (selects) {
      left_out = select_pages_of<true>(select_scratch, select, b, h, list.length, reinterpret_cast<uint32_t*>(parts),
                                       selected, selecting.loss);
    }
    __syncthreads();  // the list and the staged queries are complete
  } else {
    if (in_cluster) cluster_wait();
    wait_for_previous();
    let_next_start();
    read_length();
    if (p.pages) list.pages = p.pages + b * p.pages_stride_b + h * p.pages_stride_h;
    if (p.selected) {
      list.entries = p.counts ? p.counts[b * p.cache.kv_heads + h] : static_cast<int32_t>(p.capacity);
      const bool bad = list.entries < 0 || list.entries > p.capacity;
      finding.note(bad, Wrong::kCounts, list.entries, p.capacity);
      if (bad) list.entries = 0;
    }
    take_split();
  }

  // Each turn places a tile and asks for its keys, and computes with the tile of the turn before. So the first rows are
  // on their way while the queries are staged or what was left out is weighed, and a tile's values while its logits are
  // computed.
  float max[kBlocks][2], sum[kBlocks][2];
#pragma unroll
  for (int block = 0; block < kBlocks; ++block) {
    max[block][0] = max[block][1] = -INFINITY;
    sum[block][0] = sum[block][1] = 0;
  }
  const bool weighs = kSelects && selecting.loss && left_out.n > 0;
  TilePlace place{};
  bool placed = false;
#pragma unroll 1
  for (int32_t tile = first_tile + warp;; tile += warps) {
    const bool more = tile < end;
    TilePlace next{};
    if (placed) engine.load_v(place);
    if (more) next = list.template place<Engine::kScaled>(p, page_size, h, tile, finding);
    float s[kBlocks][4], decay[kBlocks][2];
    if (placed) engine.logits(s);
    if (more) engine.load_k(next);
    if (placed) {
#pragma unroll
      for (int block = 0; block < kBlocks; ++block) {
        for (int i = 0; i < 4; ++i) s[block][i] *= engine.logit_scale(p, place, block, i);
        if (p.softcap > 0) {
          for (float& logit : s[block]) logit = p.softcap * tanhf(logit / p.softcap);
        }
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          s[block][i] = place.valid(i / 2, n) ? s[block][i] * kLog2E : -INFINITY;
        }
        if (!kSelects && p.token_mass) {
          store_logits(p, s[block], (b * p.cache.kv_heads + h) * p.group, first_head + block * kTileHeads + 2 * c,
                       (tile - warps) * kTile + n);
        }
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          float high = fmaxf(s[block][i], s[block][2 + i]);
#pragma unroll
          for (int32_t step = 4; step < 32; step *= 2) high = fmaxf(high, __shfl_xor_sync(~0u, high, step));
          high = fmaxf(high, max[block][i]);
          // Nothing read yet: any finite number does, for the weights are 0.
          const float base = high == -INFINITY ? 0 : high;
          decay[block][i] = exp2_approx(max[block][i] - base);
          s[block][i] = exp2_approx(s[block][i] - base);
          s[block][2 + i] = exp2_approx(s[block][2 + i] - base);
          sum[block][i] = sum[block][i] * decay[block][i] + s[block][i] + s[block][2 + i];
          max[block][i] = high;
        }
      }
      engine.weigh(s, decay, place);
    } else if constexpr (!kSelects) {
      Engine::stage_queries(p, b, h, first_head, shared);
      __syncthreads();
    } else if (weighs) {
      weigh_unread(select_scratch, left_out, p.softcap);
    }
    if (!more) break;
    place = next;
    placed = true;
  }
  finding.report(errors, Op::kSparseDecode, b);

  // Warps leave their results in place of the keys that the selection staged there, once nobody looks at them.
  if (weighs) __syncthreads();
  const Partials of_warp(parts, warps, kHeads, head_dim);
#pragma unroll
  for (int block = 0; block < kBlocks; ++block) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
#pragma unroll
      for (int32_t step = 4; step < 32; step *= 2) sum[block][i] += __shfl_xor_sync(~0u, sum[block][i], step);
      if (n == 0) {
        of_warp.max[warp * kHeads + block * kTileHeads + 2 * c + i] = max[block][i];
        of_warp.sum[warp * kHeads + block * kTileHeads + 2 * c + i] = sum[block][i];
      }
    }
  }
  engine.store(of_warp.row(warp, 0), of_warp.pitch);
  __syncthreads();

  Unread unread{selecting.loss, -INFINITY};
  const auto sum_unread = [&] {
    if constexpr (kSelects) {
      if (weighs) unread.log2_sum = log2_unread(select_scratch, page_size);
    }
  };
  if (!in_cluster) sum_unread();
  const int64_t first_row = (b * p.cache.kv_heads + h) * p.group + first_head;
  const int64_t head_block = static_cast<int64_t>(b) * gridDim.y + blockIdx.y;
#pragma unroll 1
  for (int32_t i = threadIdx.x; i < vectors; i += blockDim.x) {
    const int32_t g = 4 * i / head_dim, d = 4 * i - g * head_dim;
    const Merged all = merge(
        warps, [&](int32_t w) { return of_warp.max[w * kHeads + g]; },
        [&](int32_t w) { return of_warp.sum[w * kHeads + g]; }, [&](int32_t w) { return of_warp.four(w, g, d); });
    if (splits == 1) {
      write_result(p, Engine::out_dtype(p), first_row + g, d, all, unread);
    } else if (scratch) {
      const Partials of_split(scratch + head_block * Partials::size(splits, kHeads, head_dim), splits, kHeads,
                              head_dim);
      of_split.four(split, g, d) = all.acc;
      if (d == 0) of_split.max[split * kHeads + g] = all.max, of_split.sum[split * kHeads + g] = all.sum;
    } else {
      inbox.send(split, i, i * plan.to_block >> 22, all);
    }
  }
  if (kSelects && scratch && split == 0 && threadIdx.x == 0) {
    scratch[gridDim.z * gridDim.y * Partials::size(splits, kHeads, head_dim) + head_block] = unread.log2_sum;
  }
  if (!in_cluster) return;
  sum_unread();  // while the others' parts are on their way
  remote_wait(all_there);
#pragma unroll 1
  for (int32_t t = threadIdx.x; t < inbox.share_of(split, vectors); t += blockDim.x) {
    const int32_t i = split * inbox.share + t, g = 4 * i / head_dim;
    const auto from = [&](int32_t s) { return s * inbox.share + t; };
    const Merged all = merge(
        splits, [&](int32_t s) { return inbox.max_and_sum[from(s)].x; },
        [&](int32_t s) { return inbox.max_and_sum[from(s)].y; }, [&](int32_t s) { return inbox.acc[from(s)]; });
    write_result(p, Engine::out_dtype(p), first_row + g, 4 * i - g * head_dim, all, unread);
  }
}

// Merges the splits that were not a cluster, a block for each query head: a warp takes every kMergeWarps-th, whatever
// their number, so that splits which had nothing to read change no bit. Grid: [kv_heads * head_blocks, heads, batch].
// loss: null, or to be written: the head blocks' Unread::log2_sum lie behind the parts.
constexpr int32_t kMergeWarps = 8;

template <int Heads>
__global__ void __launch_bounds__(32 * kMergeWarps, 2)
    sparse_decode_merge(const __grid_constant__ SparseDecodeParams p, const SplitPlan plan, float* scratch,
                        int32_t splits, float* loss) {
  __shared__ Merged of_warps[kMergeWarps][kMaxHeadDim / 4];
  const int32_t head_dim = static_cast<int32_t>(p.cache.head_dim), g = blockIdx.y, b = blockIdx.z;
  const int32_t h = blockIdx.x / plan.head_blocks, first_head = blockIdx.x % plan.head_blocks * Heads;
  if (first_head + g >= p.group) return;
  const int64_t head_block = static_cast<int64_t>(b) * gridDim.x + blockIdx.x;
  const Partials parts(scratch + head_block * Partials::size(splits, Heads, head_dim), splits, Heads, head_dim);
  const int32_t warp = threadIdx.x / 32;
  wait_for_previous();
  let_next_start();
#pragma unroll 1
  for (int32_t i = threadIdx.x % 32; i < head_dim / 4; i += 32) {
    const auto split = [&](int32_t turn) { return warp + turn * kMergeWarps; };
    of_warps[warp][i] = merge(
        ceil_div(splits - warp, kMergeWarps), [&](int32_t turn) { return parts.max[split(turn) * Heads + g]; },
        [&](int32_t turn) { return parts.sum[split(turn) * Heads + g]; },
        [&](int32_t turn) { return parts.four(split(turn), g, 4 * i); });
  }
  __syncthreads();
  const float* const log2_sums = scratch + gridDim.z * gridDim.x * Partials::size(splits, Heads, head_dim);
  const Unread unread{loss, loss ? log2_sums[head_block] : 0};
  const int32_t i = threadIdx.x;
  if (i >= head_dim / 4) return;
  const Merged all = merge(
      kMergeWarps, [&](int32_t w) { return of_warps[w][i].max; }, [&](int32_t w) { return of_warps[w][i].sum; },
      [&](int32_t w) { return of_warps[w][i].acc; });
  write_result(p, p.q_dtype, (b * p.cache.kv_heads + h) * p.group + first_head + g, 4 * i, all, unread);
}

template <class Engine>
void launch_sparse_decode(const SparseDecodeParams& p, const Selecting& selecting, const Launch& launch,
                          const Tensor& on) {
  const SelectPagesParams& select = selecting.pages;
  SplitPlan plan{};
  plan.head_blocks = static_cast<int32_t>((p.group + Engine::kHeads - 1) / Engine::kHeads);
  const int64_t rows = p.batch * p.cache.kv_heads * plan.head_blocks, sms = current_device().sms;
  // Few heads take all the warps an SM can hold; many run two blocks on it.
  plan.warps = 2 * rows <= sms || Engine::kBlocksPerSm > 1 ? 8 : 4;
  // Where registers allow no third block on an SM, clusters do not fill all that two would.
  const int64_t places = Engine::kBlocksPerSm > 1 ? 3 * sms / 2 : plan.warps == 8 ? sms : 2 * sms;
  plan.max_splits = static_cast<int32_t>(std::max<int64_t>(1, places / rows));
  // Clusters that have to wait for others to end would take as long again. A power of two divides tiles evenly.
  const int blocks_per_sm = places > sms ? 2 : 1;
  const auto fit = [&](int32_t splits) { return rows <= blocks_per_sm * current_device().clusters[splits]; };
  const bool has_clusters = current_device().major >= 9;
  plan.cluster_splits = std::min(kMaxCluster, plan.max_splits);
  while (has_clusters && plan.cluster_splits > 1 && !fit(plan.cluster_splits)) {
    plan.cluster_splits = std::bit_floor(plan.cluster_splits - 1u);
  }
  const int64_t pages = select.scores ? select.capacity : p.selected ? p.capacity : p.table.max_pages;
  const int64_t tiles = (pages * p.cache.page_size + kTile - 1) / kTile;
  const int32_t splits = plan.splits(static_cast<int32_t>(std::min<int64_t>(tiles, INT32_MAX)));

  const bool cluster = splits > 1 && splits <= kMaxCluster && has_clusters && fit(splits);
  const int32_t head_dim = static_cast<int32_t>(p.cache.head_dim);
  plan.parts_words = static_cast<int32_t>(std::max(Partials::size(plan.warps, Engine::kHeads, head_dim),
                                                   select.scores ? key_words(select.max_pages, 32 * plan.warps) : 0));
  const int32_t vectors = static_cast<int32_t>(std::min<int64_t>(p.group, Engine::kHeads)) * head_dim / 4;
  plan.share = (vectors + splits - 1) / splits;
  plan.to_block = ((1 << 22) + plan.share - 1) / plan.share;
  const size_t inbox = cluster ? Inbox::size(splits, plan.share) : 0;
  const size_t list = select.scores ? plan.list_words(select) : 0;
  const size_t shared = Engine::kQueryBytes + (list + plan.parts_words + inbox) * sizeof(float);
  const dim3 grid(splits, p.cache.kv_heads * plan.head_blocks, p.batch);
  const auto start = [&]<bool kSelects>(float* scratch) {
    allow_shared<sparse_decode_kernel<Engine, kSelects>>(shared);
    launch(sparse_decode_kernel<Engine, kSelects>, grid, 32 * plan.warps, shared, cluster ? splits : 1, p, selecting,
           plan, scratch, error_word());
  };
  const auto start_either = [&](float* scratch) {
    select.scores ? start.template operator()<true>(scratch) : start.template operator()<false>(scratch);
  };
  if (splits == 1 || cluster) return start_either(nullptr);
  const Tensor scratch =
      torch::stable::new_empty(on, {rows * (Partials::size(splits, Engine::kHeads, head_dim) + 1)}, ScalarType::Float);
  float* const data = static_cast<float*>(scratch.mutable_data_ptr());
  start_either(data);
  const dim3 heads(grid.y, std::min<int64_t>(p.group, Engine::kHeads), grid.z);
  launch(sparse_decode_merge<Engine::kHeads>, heads, 32 * kMergeWarps, 0, 1, p, plan, data, splits, selecting.loss);
}

}  // namespace lil::cuda

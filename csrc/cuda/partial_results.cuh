// Partial results of attention, of warps, of blocks or of a cluster's blocks: where they lie, and how they are merged.
#pragma once

#include "cuda/cluster.cuh"
#include "cuda/numbers.cuh"

namespace lil::cuda {

// Four elements of a head over `count` partial results, in order. For each result and head: the maximum (of logits
// times log2 e), the sum of weights relative to it, and the weighted sum of values; max(i), sum(i) and acc(i) read the
// i-th. Eight are read at a time, before any is used: their latencies overlap.
struct Merged {
  float max, sum;
  float4 acc;
};

template <class Max, class Sum, class Acc>
__device__ inline Merged merge(int32_t count, Max max, Sum sum, Acc acc) {
  constexpr int32_t kAtOnce = 8;
  Merged all{-INFINITY, 0, {0, 0, 0, 0}};
  const auto add = [&](int32_t first, auto there) {
    float part_max[kAtOnce], part_sum[kAtOnce];
    float4 part_acc[kAtOnce];
#pragma unroll
    for (int32_t i = 0; i < kAtOnce; ++i) {
      part_max[i] = there(i) ? max(first + i) : -INFINITY;
      part_sum[i] = there(i) ? sum(first + i) : 0;
      part_acc[i] = there(i) ? acc(first + i) : float4{0, 0, 0, 0};
    }
    float high = all.max;
#pragma unroll
    for (int32_t i = 0; i < kAtOnce; ++i) high = fmaxf(high, part_max[i]);
    const float base = high == -INFINITY ? 0 : high;  // nothing read: the weights are 0 all the same
    float weight = exp2_approx(all.max - base);
    all = {high, all.sum * weight, {all.acc.x * weight, all.acc.y * weight, all.acc.z * weight, all.acc.w * weight}};
#pragma unroll
    for (int32_t i = 0; i < kAtOnce; ++i) {
      weight = exp2_approx(part_max[i] - base);
      all.sum = fmaf(part_sum[i], weight, all.sum);
      all.acc.x = fmaf(part_acc[i].x, weight, all.acc.x);
      all.acc.y = fmaf(part_acc[i].y, weight, all.acc.y);
      all.acc.z = fmaf(part_acc[i].z, weight, all.acc.z);
      all.acc.w = fmaf(part_acc[i].w, weight, all.acc.w);
    }
  };
  if (count == kAtOnce) {  // as most are: no conditions
    add(0, [](int32_t) { return true; });
    return all;
  }
#pragma unroll 1
  for (int32_t first = 0; first < count; first += kAtOnce) {
    add(first, [&](int32_t i) { return first + i < count; });
  }
  return all;
}

// Partial results of some blocks or warps of one head block: maxima [count][heads], sums [count][heads], elements
// [count][heads][head_dim], with a gap of 16 bytes behind each head: else the warps' stores would meet in few banks.
struct Partials {
  static constexpr int32_t kGap = 4;

  float *max, *sum, *acc;
  int32_t heads, pitch;

  __device__ Partials(float* data, int32_t count, int32_t heads, int32_t head_dim)
      : max(data), sum(data + count * heads), acc(data + 2 * count * heads), heads(heads), pitch(head_dim + kGap) {}
  __host__ __device__ static int64_t size(int32_t count, int32_t heads, int32_t head_dim) {
    return static_cast<int64_t>(count) * heads * (head_dim + kGap + 2);
  }

  __device__ float* row(int32_t i, int32_t g) const { return acc + (i * heads + g) * pitch; }
  __device__ float4& four(int32_t i, int32_t g, int32_t d) const { return *reinterpret_cast<float4*>(row(i, g) + d); }
};

// What the blocks of a cluster send one of them: of each split, for its share of the head block's elements, four of
// them with their head's maximum and sum.
struct Inbox {
  float4* acc;          // [splits][share]
  float2* max_and_sum;  // [splits][share]
  Barrier& barrier;     // all of it is there
  int32_t splits, share;

  __device__ Inbox(float* data, Barrier& barrier, int32_t splits, int32_t share)
      : acc(reinterpret_cast<float4*>(data)),
        max_and_sum(reinterpret_cast<float2*>(acc + splits * share)),
        barrier(barrier),
        splits(splits),
        share(share) {}
  static int64_t size(int32_t splits, int32_t share) { return splits * share * 6; }

  // Of `vectors` in all, how many block `to` merges.
  __device__ int32_t share_of(int32_t to, int32_t vectors) const {
    return ::max(0, ::min(share, vectors - to * share));
  }
  // Before cluster_arrive(), by one thread.
  __device__ void expect(int32_t to, int32_t vectors) const {
    constexpr int32_t kBytes = sizeof(float4) + sizeof(float2);
    remote_expect(barrier, splits * share_of(to, vectors) * kBytes);
  }

  // Four elements i of split `from`, which block `to` merges.
  __device__ void send(int32_t from, int32_t i, int32_t to, const Merged& part) const {
    const int32_t at = from * share + i - to * share;
    remote_send(acc + at, to, part.acc, barrier);
    remote_send(max_and_sum + at, to, float2{part.max, part.sum}, barrier);
  }
};

}  // namespace lil::cuda

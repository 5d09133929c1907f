// sparse_decode's engine on tensor cores.
#pragma once

#include "cuda/mma.cuh"
#include "cuda/sparse_decode.cuh"

namespace lil::cuda {

// On tensor cores, rows straight from global memory (mma.cuh). Blocks: kHeads = 8 * Blocks.
template <class T, int D, int Blocks>
struct MmaEngine {
  static constexpr int kHeads = kTileHeads * Blocks;
  static constexpr int kChunks = D / 32, kTail = D % 32 / 16;  // of a row as K: 32 elements a chunk, then maybe 16
  static constexpr int kWide = D / 64, kRest = D % 64 / 16;    // of a row as V: 64 elements, then 0, 16 or 32
  static constexpr int kMTiles = D / 16;
  static constexpr DType kDType = std::is_same_v<T, __half> ? DType::kFloat16 : DType::kBFloat16;
  __device__ static constexpr int32_t head_dim_of(const SparseDecodeParams&) { return D; }
  __device__ static constexpr DType out_dtype(const SparseDecodeParams&) { return kDType; }
  static constexpr size_t kQueryBytes = Blocks * (kChunks * 32 * sizeof(uint4) + kTail * 32 * sizeof(uint2));
  static_assert(kRest == 0 || kRest == 1 || kRest == 2);

  const uint4* query;       // [Blocks][kChunks][32 lanes], as mma_chunk takes them
  const uint2* query_tail;  // [Blocks][32 lanes]
  uint4 k[2][kChunks];
  uint2 k_tail[2][kTail + 1];
  uint4 v[4][kWide];
  uint2 v_rest[4];
  float acc[Blocks][kMTiles][4];

  __device__ static void stage_queries(const SparseDecodeParams& p, int32_t b, int32_t h, int32_t first_head,
                                       void* shared) {
    uint4* const full = static_cast<uint4*>(shared);
    uint2* const tail = reinterpret_cast<uint2*>(full + Blocks * kChunks * 32);
    const auto row = [&](int32_t g) {
      return static_cast<const T*>(p.q) + b * p.q_stride_b + (h * p.group + g) * p.q_stride_h;
    };
#pragma unroll 1
    for (int32_t i = threadIdx.x; i < Blocks * kChunks * 32; i += blockDim.x) {
      const int32_t g = first_head + i / (kChunks * 32) * kTileHeads + i % 32 / 4;
      const int32_t d = i / 32 % kChunks * 32 + i % 4 * 8;
      full[i] = g < p.group ? *reinterpret_cast<const uint4*>(row(g) + d) : uint4{0, 0, 0, 0};
    }
#pragma unroll 1
    for (int32_t i = threadIdx.x; kTail && i < Blocks * 32; i += blockDim.x) {
      const int32_t g = first_head + i / 32 * kTileHeads + i % 32 / 4, d = kChunks * 32 + i % 4 * 4;
      tail[i] = g < p.group ? *reinterpret_cast<const uint2*>(row(g) + d) : uint2{0, 0};
    }
  }

  __device__ MmaEngine(const SparseDecodeParams&, const void* shared) {
    query = static_cast<const uint4*>(shared) + threadIdx.x % 32;
    query_tail =
        reinterpret_cast<const uint2*>(static_cast<const uint4*>(shared) + Blocks * kChunks * 32) + threadIdx.x % 32;
    for (auto& block : acc) {
      for (auto& tile : block) tile[0] = tile[1] = tile[2] = tile[3] = 0;
    }
  }

  __device__ void load_k(const SparseDecodeParams& p, const TilePlace& place) {
    const int32_t n = threadIdx.x % 32 / 4, c = threadIdx.x % 4;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const bool valid = place.valid(half, n);
      const T* const row = static_cast<const T*>(p.cache.k.data) + place.k[half] + n * p.cache.k.stride_token;
#pragma unroll
      for (int j = 0; j < kChunks; ++j) {
        k[half][j] = valid ? load_once(reinterpret_cast<const uint4*>(row + 32 * j + 8 * c)) : uint4{0, 0, 0, 0};
      }
      if constexpr (kTail) {
        k_tail[half][0] = valid ? load_once(reinterpret_cast<const uint2*>(row + 32 * kChunks + 4 * c)) : uint2{0, 0};
      }
    }
  }

  __device__ void logits(float (&s)[Blocks][4]) const {
#pragma unroll
    for (int block = 0; block < Blocks; ++block) {
      s[block][0] = s[block][1] = s[block][2] = s[block][3] = 0;
#pragma unroll
      for (int j = 0; j < kChunks; ++j) {
        mma_chunk<T>(s[block], k[0][j], k[1][j], query[(block * kChunks + j) * 32]);
      }
      if constexpr (kTail) {
        const uint2 q = query_tail[block * 32];
        mma<T>(s[block], k_tail[0][0].x, k_tail[1][0].x, k_tail[0][0].y, k_tail[1][0].y, q.x, q.y);
      }
    }
  }

  // Rows that are not read are zeros here: a weight of 0 times whatever lies there must stay 0.
  __device__ void load_v(const SparseDecodeParams& p, const TilePlace& place) {
    const int32_t n = threadIdx.x % 32 / 4, c = threadIdx.x % 4;
#pragma unroll
    for (int t = 0; t < 4; ++t) {  // tokens 2c, 2c + 1 of each half
      const int32_t half = t / 2, token = 2 * c + t % 2;
      const bool valid = place.valid(half, token);
      const T* const row = static_cast<const T*>(p.cache.v.data) + place.v[half] + token * p.cache.v.stride_token;
#pragma unroll
      for (int j = 0; j < kWide; ++j) {
        v[t][j] = valid ? load_once(reinterpret_cast<const uint4*>(row + 64 * j + 8 * n)) : uint4{0, 0, 0, 0};
      }
      v_rest[t] = {0, 0};
      if constexpr (kRest == 1) {
        if (valid) v_rest[t].x = load_once(reinterpret_cast<const uint32_t*>(row + 64 * kWide + 2 * n));
      }
      if constexpr (kRest == 2) {
        if (valid) v_rest[t] = load_once(reinterpret_cast<const uint2*>(row + 64 * kWide + 4 * n));
      }
    }
  }

  // Two elements d, d + 1 of four tokens: rows n and n + 8 of one product with the weights.
  __device__ static void weigh_pair(float (&acc)[4], uint32_t t0, uint32_t t1, uint32_t t2, uint32_t t3,
                                    const uint32_t (&weights)[2]) {
    constexpr uint32_t kLow = 0x5410, kHigh = 0x7632;
    mma<T>(acc, __byte_perm(t0, t1, kLow), __byte_perm(t0, t1, kHigh), __byte_perm(t2, t3, kLow),
           __byte_perm(t2, t3, kHigh), weights[0], weights[1]);
  }

  // acc = acc * decay + weights x values; decay for heads 2c and 2c + 1.
  __device__ void weigh(const float (&s)[Blocks][4], const float (&decay)[Blocks][2]) {
#pragma unroll
    for (int block = 0; block < Blocks; ++block) {
      const uint32_t weights[2] = {transpose(pack<T>(s[block][0], s[block][1])),
                                   transpose(pack<T>(s[block][2], s[block][3]))};
#pragma unroll
      for (auto& tile : acc[block]) {
        tile[0] *= decay[block][0], tile[2] *= decay[block][0];
        tile[1] *= decay[block][1], tile[3] *= decay[block][1];
      }
#pragma unroll
      for (int j = 0; j < kWide; ++j) {
        float (*const tile)[4] = acc[block] + 4 * j;
        weigh_pair(tile[0], v[0][j].x, v[1][j].x, v[2][j].x, v[3][j].x, weights);
        weigh_pair(tile[1], v[0][j].y, v[1][j].y, v[2][j].y, v[3][j].y, weights);
        weigh_pair(tile[2], v[0][j].z, v[1][j].z, v[2][j].z, v[3][j].z, weights);
        weigh_pair(tile[3], v[0][j].w, v[1][j].w, v[2][j].w, v[3][j].w, weights);
      }
      float (*const tile)[4] = acc[block] + 4 * kWide;
      if constexpr (kRest >= 1) weigh_pair(tile[0], v_rest[0].x, v_rest[1].x, v_rest[2].x, v_rest[3].x, weights);
      if constexpr (kRest == 2) weigh_pair(tile[1], v_rest[0].y, v_rest[1].y, v_rest[2].y, v_rest[3].y, weights);
    }
  }

  // The sums, [kHeads][D].
  __device__ void store(float* out) const {
    const int32_t n = threadIdx.x % 32 / 4, c = threadIdx.x % 4;
#pragma unroll
    for (int block = 0; block < Blocks; ++block) {
#pragma unroll
      for (int m = 0; m < kMTiles; ++m) {
        const int32_t d =
            m < 4 * kWide ? m / 4 * 64 + 8 * n + m % 4 * 2 : kWide * 64 + 2 * kRest * n + (m - 4 * kWide) * 2;
        float* const at = out + (block * kTileHeads + 2 * c) * D + d;
        *reinterpret_cast<float2*>(at) = {acc[block][m][0], acc[block][m][2]};
        *reinterpret_cast<float2*>(at + D) = {acc[block][m][1], acc[block][m][3]};
      }
    }
  }
};

// Sixteen heads at a time where the group has more than eight and the registers allow.
template <class T, int D>
void launch_sparse_decode_mma(const SparseDecodeParams& p, const SelectPagesParams& select, const Launch& launch,
                              const Tensor& on) {
  if constexpr (D <= 128) {
    if (p.group > kTileHeads) return launch_sparse_decode<MmaEngine<T, D, 2>>(p, select, launch, on);
  }
  launch_sparse_decode<MmaEngine<T, D, 1>>(p, select, launch, on);
}

#define LIL_INSTANTIATE(T, D)                                                                                      \
  template void launch_sparse_decode_mma<T, D>(const SparseDecodeParams&, const SelectPagesParams&, const Launch&, \
                                               const Tensor&);

}  // namespace lil::cuda

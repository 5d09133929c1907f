// sparse_decode's engine on tensor cores.
#pragma once

#include "cuda/mma.cuh"
#include "cuda/sparse_decode.cuh"

namespace lil::cuda {

// On tensor cores, rows straight from global memory (mma.cuh). Blocks: kHeads = 8 * Blocks. float8 becomes halves in
// registers; its scales multiply logits and weights.
template <class T, int D, int Blocks>
struct MmaEngine {
  using C = Computed<T>;
  using Two = typename Stored<T>::Two;
  using Four = typename Stored<T>::Four;
  using Eight = typename Stored<T>::Eight;
  static constexpr bool kScaled = kIsFloat8<T>;
  // Weights are at most 1, and halves have few digits far below: they are taken times this.
  static constexpr float kWeightUnit = std::is_same_v<C, __half> ? 32768 : 1;
  static constexpr int kHeads = kTileHeads * Blocks;
  // float8 has half the bytes in flight a warp, and takes half the registers: twice the warps.
  static constexpr int kBlocksPerSm = kScaled && Blocks == 1 && D <= 128 ? 2 : 1;
  static constexpr int kChunks = D / 32, kTail = D % 32 / 16;  // of a row as K: 32 elements a chunk, then maybe 16
  static constexpr int kWide = D / 64, kRest = D % 64 / 16;    // of a row as V: 64 elements, then 0, 16 or 32
  static constexpr int kMTiles = D / 16;
  __device__ static constexpr int32_t head_dim_of(const SparseDecodeParams&) { return D; }
  __device__ static DType out_dtype(const SparseDecodeParams& p) {
    if constexpr (kScaled) return p.q_dtype;
    return std::is_same_v<T, __half> ? DType::kFloat16 : DType::kBFloat16;
  }
  static constexpr size_t kStagedBytes = Blocks * (kChunks * 32 * sizeof(uint4) + kTail * 32 * sizeof(uint2));
  static constexpr size_t kQueryBytes = kStagedBytes + (kScaled ? kHeads * sizeof(float) : 0);
  static_assert(kRest == 0 || kRest == 1 || kRest == 2);

  const uint4* query;        // [Blocks][kChunks][32 lanes], as mma_chunk takes them
  const uint2* query_tail;   // [Blocks][32 lanes]
  const float* factors;      // [kHeads]: what the staged queries were divided by
  float unit = 0;            // of acc: the largest scale of values so far
  const T *k_data, *v_data;  // rows n and 2c of page 0, where this lane's first elements are
  int64_t v_stride;
  Eight k[2][kChunks];
  Four k_tail[2][kTail + 1];
  Eight v[4][kWide];
  Four v_four[4];
  Two v_two[4];
  float acc[Blocks][kMTiles][4];

  __device__ static float* factors_in(void* shared) {
    return reinterpret_cast<float*>(static_cast<char*>(shared) + kStagedBytes);
  }

  // N elements of head g from d on, as words of two.
  template <int N>
  __device__ static void stage(const SparseDecodeParams& p, int32_t b, int32_t h, int32_t first_head, int32_t head,
                               int32_t d, uint32_t* to, const float* factors) {
    const int32_t g = first_head + head;
    const int64_t at = b * p.q_stride_b + (h * p.group + g) * p.q_stride_h + d;
    uint32_t words[N / 2] = {};
    if (g < p.group) {
      // Queries of both dtypes are two bytes wide.
      const uint32_t* const from = reinterpret_cast<const uint32_t*>(static_cast<const __half*>(p.q) + at);
#pragma unroll
      for (int i = 0; i < N / 2; ++i) words[i] = from[i];
      if constexpr (kScaled) {
        const float inverse = 1 / factors[head];
#pragma unroll
        for (int i = 0; i < N / 2; ++i) {
          words[i] =
              pack<C>(load_float(words, p.q_dtype, 2 * i) * inverse, load_float(words, p.q_dtype, 2 * i + 1) * inverse);
        }
      }
    }
#pragma unroll
    for (int i = 0; i < N / 2; ++i) to[i] = words[i];
  }

  __device__ static void stage_queries(const SparseDecodeParams& p, int32_t b, int32_t h, int32_t first_head,
                                       void* shared) {
    uint4* const full = static_cast<uint4*>(shared);
    uint2* const tail = reinterpret_cast<uint2*>(full + Blocks * kChunks * 32);
    float* const factors = factors_in(shared);
    if constexpr (kScaled) {
      const int64_t first = b * p.q_stride_b + (h * p.group + first_head) * p.q_stride_h;
      make_query_factors<D>(p.q, p.q_dtype, first, p.q_stride_h, p.group - first_head, kHeads, factors);
      __syncthreads();
    }
#pragma unroll 1
    for (int32_t i = threadIdx.x; i < Blocks * kChunks * 32; i += blockDim.x) {
      const int32_t head = i / (kChunks * 32) * kTileHeads + i % 32 / 4, d = i / 32 % kChunks * 32 + i % 4 * 8;
      uint4 words;
      stage<8>(p, b, h, first_head, head, d, &words.x, factors);
      full[i] = words;
    }
#pragma unroll 1
    for (int32_t i = threadIdx.x; kTail && i < Blocks * 32; i += blockDim.x) {
      const int32_t head = i / 32 * kTileHeads + i % 32 / 4, d = kChunks * 32 + i % 4 * 4;
      uint2 words;
      stage<4>(p, b, h, first_head, head, d, &words.x, factors);
      tail[i] = words;
    }
  }

  __device__ MmaEngine(const SparseDecodeParams& p, int32_t h, void* shared) : factors(factors_in(shared)) {
    const int32_t n = threadIdx.x % 32 / 4, c = threadIdx.x % 4;
    const auto row = [&](const PagedBuffer& buffer, int32_t token) {
      return static_cast<const T*>(buffer.data) + h * buffer.stride_head + token * buffer.stride_token;
    };
    k_data = row(p.cache.k, n) + 8 * c, v_data = row(p.cache.v, 2 * c) + 8 * n, v_stride = p.cache.v.stride_token;
    if constexpr (kBlocksPerSm == 1) keep(k_data), keep(v_data);  // else registers are few
    query = static_cast<const uint4*>(shared) + threadIdx.x % 32;
    query_tail =
        reinterpret_cast<const uint2*>(static_cast<const uint4*>(shared) + Blocks * kChunks * 32) + threadIdx.x % 32;
    for (auto& block : acc) {
      for (auto& tile : block) tile[0] = tile[1] = tile[2] = tile[3] = 0;
    }
  }

  __device__ void load_k(const TilePlace& place) {
    const int32_t n = threadIdx.x % 32 / 4, c = threadIdx.x % 4;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const bool valid = place.valid(half, n);
      const T* row = k_data + place.k[half];
      keep(row);
#pragma unroll
      for (int j = 0; j < kChunks; ++j) {
        k[half][j] = valid ? load_once(reinterpret_cast<const Eight*>(row + 32 * j)) : Eight{};
      }
      if constexpr (kTail) {
        k_tail[half][0] = valid ? load_once(reinterpret_cast<const Four*>(row + 32 * kChunks - 4 * c)) : Four{};
      }
    }
  }

  // Of queries as they were staged, and keys not scaled: logit_scale makes up for both.
  __device__ void logits(float (&s)[Blocks][4]) const {
#pragma unroll
    for (int block = 0; block < Blocks; ++block) {
      s[block][0] = s[block][1] = s[block][2] = s[block][3] = 0;
#pragma unroll
      for (int j = 0; j < kChunks; ++j) {
        mma_chunk<C>(s[block], widen8<T>(k[0][j]), widen8<T>(k[1][j]), query[(block * kChunks + j) * 32]);
      }
      if constexpr (kTail) {
        const uint2 q = query_tail[block * 32], low = widen4<T>(k_tail[0][0]), high = widen4<T>(k_tail[1][0]);
        mma<C>(s[block], low.x, high.x, low.y, high.y, q.x, q.y);
      }
    }
  }

  // What logit i of a block is multiplied by.
  __device__ float logit_scale(const SparseDecodeParams& p, const TilePlace& place, int block, int i) const {
    if constexpr (!kScaled) return p.scale;
    return p.scale * place.k_scale[i / 2] * factors[block * kTileHeads + threadIdx.x % 4 * 2 + i % 2];
  }

  // Rows that are not read are zeros here: a weight of 0 times whatever lies there must stay 0.
  __device__ void load_v(const TilePlace& place) {
    const int32_t n = threadIdx.x % 32 / 4, c = threadIdx.x % 4;
#pragma unroll
    for (int t = 0; t < 4; ++t) {  // tokens 2c, 2c + 1 of each half
      const int32_t half = t / 2, token = 2 * c + t % 2;
      const bool valid = place.valid(half, token);
      const T* row = v_data + (place.v[half] + t % 2 * v_stride);
      keep(row);
#pragma unroll
      for (int j = 0; j < kWide; ++j) {
        v[t][j] = valid ? load_once(reinterpret_cast<const Eight*>(row + 64 * j)) : Eight{};
      }
      if constexpr (kRest == 1) {
        v_two[t] = valid ? load_once(reinterpret_cast<const Two*>(row + 64 * kWide - 6 * n)) : Two{};
      }
      if constexpr (kRest == 2) {
        v_four[t] = valid ? load_once(reinterpret_cast<const Four*>(row + 64 * kWide - 4 * n)) : Four{};
      }
    }
  }

  // Two elements d, d + 1 of four tokens: rows n and n + 8 of one product with the weights.
  __device__ static void weigh_pair(float (&acc)[4], uint32_t t0, uint32_t t1, uint32_t t2, uint32_t t3,
                                    const uint32_t (&weights)[2]) {
    constexpr uint32_t kLow = 0x5410, kHigh = 0x7632;
    mma<C>(acc, __byte_perm(t0, t1, kLow), __byte_perm(t0, t1, kHigh), __byte_perm(t2, t3, kLow),
           __byte_perm(t2, t3, kHigh), weights[0], weights[1]);
  }

  // acc = acc * decay + weights x values; decay for heads 2c and 2c + 1. Halves hold weights in units of the largest
  // scale of values so far.
  __device__ void weigh(const float (&s)[Blocks][4], const float (&decay)[Blocks][2], const TilePlace& place) {
    float of_half[2] = {kWeightUnit, kWeightUnit}, of_acc = 1;
    if constexpr (kScaled) {
      const float most = fmaxf(unit, fmaxf(fabsf(place.v_scale[0]), fabsf(place.v_scale[1])));
      const float inverse = most > 0 ? 1 / most : 0;
      of_half[0] *= place.v_scale[0] * inverse, of_half[1] *= place.v_scale[1] * inverse, of_acc = unit * inverse;
      unit = most;
    }
#pragma unroll
    for (int block = 0; block < Blocks; ++block) {
      uint32_t weights[2];
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const float low = s[block][2 * half], high = s[block][2 * half + 1];
        weights[half] =
            transpose(kWeightUnit > 1 ? pack<C>(low * of_half[half], high * of_half[half]) : pack<C>(low, high));
      }
#pragma unroll
      for (auto& tile : acc[block]) {
#pragma unroll
        for (int i = 0; i < 4; ++i) tile[i] *= kScaled ? decay[block][i % 2] * of_acc : decay[block][i % 2];
      }
#pragma unroll
      for (int j = 0; j < kWide; ++j) {
        float (*const tile)[4] = acc[block] + 4 * j;
        const uint4 t0 = widen8<T>(v[0][j]), t1 = widen8<T>(v[1][j]), t2 = widen8<T>(v[2][j]), t3 = widen8<T>(v[3][j]);
        weigh_pair(tile[0], t0.x, t1.x, t2.x, t3.x, weights);
        weigh_pair(tile[1], t0.y, t1.y, t2.y, t3.y, weights);
        weigh_pair(tile[2], t0.z, t1.z, t2.z, t3.z, weights);
        weigh_pair(tile[3], t0.w, t1.w, t2.w, t3.w, weights);
      }
      float (*const tile)[4] = acc[block] + 4 * kWide;
      if constexpr (kRest == 1) {
        weigh_pair(tile[0], widen2<T>(v_two[0]), widen2<T>(v_two[1]), widen2<T>(v_two[2]), widen2<T>(v_two[3]),
                   weights);
      }
      if constexpr (kRest == 2) {
        const uint2 t0 = widen4<T>(v_four[0]), t1 = widen4<T>(v_four[1]), t2 = widen4<T>(v_four[2]),
                    t3 = widen4<T>(v_four[3]);
        weigh_pair(tile[0], t0.x, t1.x, t2.x, t3.x, weights);
        weigh_pair(tile[1], t0.y, t1.y, t2.y, t3.y, weights);
      }
    }
  }

  // The sums, [kHeads][D], heads `pitch` apart.
  __device__ void store(float* out, int32_t pitch) const {
    const int32_t n = threadIdx.x % 32 / 4, c = threadIdx.x % 4;
    const float scale = (kScaled ? unit : 1) / kWeightUnit;
#pragma unroll
    for (int block = 0; block < Blocks; ++block) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        float* const head = out + (block * kTileHeads + 2 * c + i) * pitch;
        // Two tiles are four elements side by side.
        const auto four = [&](int m) {
          const float (&low)[4] = acc[block][m], (&high)[4] = acc[block][m + 1];
          return float4{low[i] * scale, low[2 + i] * scale, high[i] * scale, high[2 + i] * scale};
        };
#pragma unroll
        for (int j = 0; j < kWide; ++j) {
          // Lanes of odd n store the second four first: else half of the banks would have it all.
          const float4 first = four(4 * j), second = four(4 * j + 2);
          const bool odd = n % 2;
          float* const at = head + 64 * j + 8 * n;
          *reinterpret_cast<float4*>(at + 4 * odd) = odd ? second : first;
          *reinterpret_cast<float4*>(at + 4 * !odd) = odd ? first : second;
        }
        float* const rest = head + 64 * kWide + 2 * kRest * n;
        if constexpr (kRest == 1) {
          const float (&tile)[4] = acc[block][4 * kWide];
          *reinterpret_cast<float2*>(rest) = {tile[i] * scale, tile[2 + i] * scale};
        }
        if constexpr (kRest == 2) *reinterpret_cast<float4*>(rest) = four(4 * kWide);
      }
    }
  }
};

// Sixteen heads at a time where the group has more than eight and the registers allow.
template <class T, int D>
void launch_sparse_decode_mma(const SparseDecodeParams& p, const Selecting& select, const Launch& launch,
                              const Tensor& on) {
  if constexpr (D <= 128) {
    if (p.group > kTileHeads) return launch_sparse_decode<MmaEngine<T, D, 2>>(p, select, launch, on);
  }
  launch_sparse_decode<MmaEngine<T, D, 1>>(p, select, launch, on);
}

#define LIL_INSTANTIATE(T, D)                                                                              \
  template void launch_sparse_decode_mma<T, D>(const SparseDecodeParams&, const Selecting&, const Launch&, \
                                               const Tensor&);

}  // namespace lil::cuda

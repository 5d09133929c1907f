// Tensor-core products of cached rows, straight from global memory to registers.
//
// mma.m16n8k16 wants from each lane a few elements of k (the dimension summed over). A sum does not care about its
// order, so the lanes take 16 contiguous bytes each and call them the k that the instruction means: rows need no
// staging in shared memory and no transposition, as long as both operands use the same order. Lane = 4 * n + c.
#pragma once

#include "cuda/numbers.cuh"

namespace lil::cuda {

// acc[16 x 8] += a[16 x 16] b[16 x 8]. Lane (n, c) has a: rows n, n + 8, k 2c, 2c + 1 and 2c + 8, 2c + 9; b: column n,
// the same k; acc: rows n (0, 1) and n + 8 (2, 3), columns 2c and 2c + 1.
template <class T>
__device__ inline void mma(float (&acc)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0,
                           uint32_t b1) {
  if constexpr (std::is_same_v<T, __half>) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(acc[0]), "+f"(acc[1]), "+f"(acc[2]), "+f"(acc[3])
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
  } else {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(acc[0]), "+f"(acc[1]), "+f"(acc[2]), "+f"(acc[3])
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
  }
}

// Two k-steps over 32 elements of a row: chunk j of a row is elements 32 j to 32 j + 31, of which lane (n, c) holds
// 32 j + 8 c to 32 j + 8 c + 7. low, high: rows n and n + 8; b: row n of the other operand, the same elements.
template <class T>
__device__ inline void mma_chunk(float (&acc)[4], uint4 low, uint4 high, uint4 b) {
  mma<T>(acc, low.x, high.x, low.y, high.y, b.x, b.y);
  mma<T>(acc, low.z, high.z, low.w, high.w, b.z, b.w);
}

// Queries as halves: bf16 reaches further, so each head is divided by its largest power of two (1 where there is none,
// or where there are infinities or NaN). most: the largest magnitude of the head.
__device__ inline float query_factor(float most) {
  const uint32_t power = __float_as_uint(most) & 0x7f800000u;
  return power == 0 || power == 0x7f800000u ? 1 : __uint_as_float(power);
}

// Heads lie `stride` elements apart from element `first` on; `padded` factors are written, a warp each.
template <int D>
__device__ inline void make_query_factors(const void* q, DType dtype, int64_t first, int64_t stride, int32_t heads,
                                          int32_t padded, float* factors) {
#pragma unroll 1
  for (int32_t g = threadIdx.x / 32; g < padded; g += blockDim.x / 32) {
    uint32_t most = 0;
#pragma unroll
    for (int32_t d = threadIdx.x % 32; d < D; d += 32) {
      if (g < heads) most = max(most, __float_as_uint(fabsf(load_float(q, dtype, first + g * stride + d))));
    }
    most = __reduce_max_sync(~0u, most);
    if (threadIdx.x % 32 == 0) factors[g] = query_factor(__uint_as_float(most));
  }
}

// An 8 x 8 matrix of halves, lane (n, c) holding row n, columns 2c and 2c + 1.
__device__ inline uint32_t transpose(uint32_t x) {
  uint32_t y;
  asm("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(y) : "r"(x));
  return y;
}

}  // namespace lil::cuda

// decode_linear: a step reads every weight once, so what counts is that reading never pauses. One block a
// multiprocessor; a warp of it copies weights into a ring of stages, from before the previous kernel has ended (weights
// are nobody's output), and eight warps multiply. A stage is 16 rows of the weight, of which each warp has a part of
// the columns; at the end of the rows the warps' sums are added.
//
// x is not normalised beforehand: it is multiplied by `norm` alone, its squares are summed on the way, and the root is
// applied to the sums.
#include "cuda/backend.h"
#include "cuda/bulk_copy.cuh"
#include "cuda/launch.cuh"
#include "cuda/mma.cuh"

namespace lil::cuda {
namespace {

constexpr int kWarps = 8, kMultiplying = 32 * kWarps, kThreads = kMultiplying + 32;
constexpr int kRows = 16, kColumns = 512, kChunks = kColumns / 32 / kWarps;
// Shared memory between two rows of a stage; eight lanes that load 16 bytes each of two rows meet all 32 banks once.
constexpr int kPitch = 2 * kColumns + 64;

// Two blocks of consecutive kernels fit into a multiprocessor.
constexpr int kStages = 6;

#if __CUDA_ARCH__ >= 900

// Which row of the weight is row r of unit u. Gated: eight rows of the gate, then the same eight of the other half.
__device__ inline int64_t weight_row(const DecodeLinearParams& p, int32_t u, int32_t r) {
  return p.gated ? u * 8 + r % 8 + (r / 8) * p.out_features : static_cast<int64_t>(u) * kRows + r;
}

__device__ inline float silu(float x) { return x / (1 + __expf(-x)); }

// Products x * norm in T; the squares of x are added to `squares`.
template <class T>
__device__ inline uint32_t times_norm(uint32_t x, uint32_t norm, float& squares) {
  const T *a = reinterpret_cast<const T*>(&x), *b = reinterpret_cast<const T*>(&norm);
  const float low = to_float(a[0]), high = to_float(a[1]);
  squares += low * low + high * high;
  return pack<T>(low * to_float(b[0]), high * to_float(b[1]));
}

// The columns of one stage that this lane multiplies, of row n of x.
template <class T, bool Norm>
struct Input {
  uint4 x[kChunks], norm[Norm ? kChunks : 1];

  __device__ void load(const DecodeLinearParams& p, int32_t column, int32_t n) {
#pragma unroll
    for (int i = 0; i < kChunks; ++i) {
      const int64_t k = column + 32 * i;
      const bool inside = k < p.in_features;
      const T* const row = static_cast<const T*>(p.x) + n * p.in_features;
      x[i] = inside && n < p.rows ? *reinterpret_cast<const uint4*>(row + k) : uint4{};
      if constexpr (Norm) {
        norm[i] = inside ? __ldg(reinterpret_cast<const uint4*>(static_cast<const T*>(p.norm) + k)) : uint4{};
      }
    }
  }

  __device__ void scale(float& squares) {
    if constexpr (Norm) {
#pragma unroll
      for (int i = 0; i < kChunks; ++i) {
        x[i].x = times_norm<T>(x[i].x, norm[i].x, squares);
        x[i].y = times_norm<T>(x[i].y, norm[i].y, squares);
        x[i].z = times_norm<T>(x[i].z, norm[i].z, squares);
        x[i].w = times_norm<T>(x[i].w, norm[i].w, squares);
      }
    }
  }
};

// Of one unit, [row of the weight / 8][row of x][row of the weight % 8].
using Sums = float[128];

template <class T, bool Norm>
__device__ inline void write(const DecodeLinearParams& p, int32_t unit, const Sums* sums, const float (*squares)[8]) {
  const auto total = [&](int32_t i) {
    float sum = 0;
#pragma unroll
    for (int warp = 0; warp < kWarps; ++warp) sum += sums[warp][i];
    return sum;
  };
  const int32_t i = threadIdx.x, halves = p.gated ? 1 : 2, row = i % 64 / 8;
  if (i >= halves * 64 || row >= p.rows) return;
  const int32_t output = (unit * halves + i / 64) * 8 + i % 8;
  float scale = 1;
  if constexpr (Norm) {
    float sum = 0;
#pragma unroll
    for (int warp = 0; warp < kWarps; ++warp) sum += squares[warp][row];
    scale = rsqrtf(sum / static_cast<float>(p.in_features) + p.eps);
  }
  float y = total(i) * scale;
  if (p.gated) y = silu(y) * total(64 + i) * scale;
  const int64_t at = row * p.out_features + output;
  if (p.bias) y += to_float(static_cast<const T*>(p.bias)[output]);
  if (p.residual) y += to_float(static_cast<const T*>(p.residual)[at]);
  static_cast<T*>(p.out)[at] = from_float<T>(y);
}

#endif

template <class T, bool Norm>
__global__ void __launch_bounds__(kThreads) decode_linear_kernel(const __grid_constant__ DecodeLinearParams p) {
#if __CUDA_ARCH__ >= 900
  extern __shared__ __align__(16) unsigned char ring[];  // [kStages][kRows][kPitch]
  __shared__ Sums sums[2][kWarps];
  __shared__ float squares[kWarps][8];
  __shared__ Barrier full[kStages], empty[kStages];
  // Its blocks read weights meanwhile, and wait for all of this kernel before they read more.
  let_next_start();
  if (threadIdx.x == 0) {
    for (int i = 0; i < kStages; ++i) {
      barrier_init(full[i], 1);
      barrier_init(empty[i], kWarps);
    }
    barriers_are_ready();
  }
  __syncthreads();
  const int32_t warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int32_t columns = static_cast<int32_t>(p.in_features), stages = (columns + kColumns - 1) / kColumns;
  const int32_t units = static_cast<int32_t>(p.out_features) / (p.gated ? 8 : kRows);
  int32_t slot = 0;
  uint32_t parity = 0;
  const auto next = [&] {
    if (++slot == kStages) {
      slot = 0;
      parity ^= 1;
    }
  };
  if (warp == kWarps) {
    for (int32_t unit = blockIdx.x; unit < units; unit += gridDim.x) {
      for (int32_t stage = 0; stage < stages; ++stage) {
        const int32_t bytes = 2 * min(kColumns, columns - stage * kColumns);
        barrier_wait(empty[slot], parity ^ 1);
        if (lane == 0) barrier_expect(full[slot], bytes * kRows);
        __syncwarp();
        if (lane < kRows) {
          const T* const row = static_cast<const T*>(p.weight) + weight_row(p, unit, lane) * p.in_features;
          bulk_copy(ring + (slot * kRows + lane) * kPitch, row + stage * kColumns, bytes, full[slot]);
        }
        next();
      }
    }
    wait_for_previous();
    return;
  }
  const int32_t n = lane / 4, c = lane % 4, first = warp * kChunks * 32 + 8 * c;
  wait_for_previous();
  Input<T, Norm> input;
  input.load(p, first, n);
  int32_t side = 0;
  for (int32_t unit = blockIdx.x; unit < units; unit += gridDim.x, side ^= 1) {
    float acc[4] = {}, square = 0;
    for (int32_t stage = 0; stage < stages; ++stage) {
      Input<T, Norm> present = input;
      present.scale(square);
      input.load(p, first + (stage + 1 < stages ? stage + 1 : 0) * kColumns, n);  // while the weights come
      barrier_wait(full[slot], parity);
#pragma unroll
      for (int i = 0; i < kChunks; ++i) {
        const unsigned char* const at = ring + (slot * kRows + n) * kPitch + 2 * (first + 32 * i);
        uint4 low{}, high{};
        if (stage * kColumns + first + 32 * i < columns) {
          low = *reinterpret_cast<const uint4*>(at);
          high = *reinterpret_cast<const uint4*>(at + 8 * kPitch);
        }
        mma_chunk<T>(acc, low, high, present.x[i]);
      }
      __syncwarp();
      if (lane == 0) barrier_arrive(empty[slot]);
      next();
    }
    float* const mine = sums[side][warp];
#pragma unroll
    for (int i = 0; i < 4; ++i) mine[i / 2 * 64 + (2 * c + i % 2) * 8 + n] = acc[i];
    if (Norm && unit == blockIdx.x) {  // of the same x for every unit
      square += __shfl_xor_sync(~0u, square, 1);
      square += __shfl_xor_sync(~0u, square, 2);
      if (c == 0) squares[warp][n] = square;
    }
    // The multiplying warps alone. The other side's sums have been read by all who come here.
    asm volatile("bar.sync 1, %0;" ::"n"(kMultiplying) : "memory");
    write<T, Norm>(p, unit, sums[side], squares);
  }
#endif
}

template <class T, bool Norm>
void start(const DecodeLinearParams& p, const Launch& launch) {
  constexpr size_t bytes = static_cast<size_t>(kStages) * kRows * kPitch;
  constexpr auto kernel = decode_linear_kernel<T, Norm>;
  allow_shared<kernel>(bytes);
  const int64_t units = p.out_features / (p.gated ? 8 : kRows), sms = current_device().sms;
  launch(kernel, dim3(static_cast<unsigned>(units < sms ? units : sms)), kThreads, bytes, 1, p);
}

}  // namespace

void decode_linear(const DecodeLinearParams& p, const Tensor& on) {
  const char* op = "decode_linear";
  const Launch launch(on);
  LIL_CHECK(current_device().major >= 9, op, "x", "on CUDA, a device of compute capability 9.0 or later",
            text(current_device().major, ".x"));
  LIL_CHECK(p.dtype != DType::kFloat32, op, "x", "on CUDA, dtype float16 or bfloat16", "Float");
  // x * norm, not yet divided by the root of its mean square, may be more than float16 holds.
  LIL_CHECK(!p.norm || p.dtype == DType::kBFloat16, op, "norm", "on CUDA, None or dtype bfloat16", "Half");
  if (p.dtype == DType::kFloat16) return start<__half, false>(p, launch);
  p.norm ? start<__nv_bfloat16, true>(p, launch) : start<__nv_bfloat16, false>(p, launch);
}

}  // namespace lil::cuda

// decode_linear: a step reads every weight once, so what counts is that reading never pauses. Warps of each block copy
// weights into a ring of stages, from before the previous kernel has ended (weights are nobody's output), and eight
// warps multiply. A stage is 16 rows of the weight, of which each warp has a part of the columns; at the end of the
// rows the warps' sums are added.
//
// x is not normalised beforehand: it is multiplied by `norm` alone, its squares are summed on the way, and the root is
// applied to the sums.
#include "cuda/backend.h"
#include "cuda/bulk_copy.cuh"
#include "cuda/launch.cuh"
#include "cuda/mma.cuh"

namespace lil::cuda {
namespace {

// A warp starts one lane's copy after the other: alone, it would not keep a multiprocessor at its share of the
// bandwidth, where fewer than all of them have a block.
constexpr int kWarps = 8, kMultiplying = 32 * kWarps, kCopying = 2, kThreads = kMultiplying + 32 * kCopying;
constexpr int kRows = 16, kColumns = 512, kChunks = kColumns / 32 / kWarps;
// Shared memory between two rows of a stage; eight lanes that load 16 bytes each of two rows meet all 32 banks once.
constexpr int kPitch = 2 * kColumns + 64;

// As many as let two blocks into a multiprocessor, of one kernel or of two.
constexpr int kStages = 6, kBlocks = 2;

// Nanoseconds between two stages that a block asks L2 for.
constexpr unsigned kPause = 600;

// Stages of x that a lane keeps for all units, where that is all of x; or else has loaded before it needs them.
constexpr int kHeld = 4, kAhead = 3;

#if __CUDA_ARCH__ >= 900

// Which row of the weight is row r of unit u. Gated: eight rows of the gate, then the same eight of the other half.
// Rotated: eight of a head's first half, then the eight that they turn with.
__device__ inline int64_t weight_row(const DecodeLinearParams& p, int32_t u, int32_t r) {
  if (p.gated) return u * 8 + r % 8 + (r / 8) * p.out_features;
  const int32_t head_dim = static_cast<int32_t>(p.head_dim), a_head = head_dim / kRows;
  if (u * kRows < p.rotated) return u / a_head * head_dim + u % a_head * 8 + r % 8 + (r / 8) * (head_dim / 2);
  return static_cast<int64_t>(u) * kRows + r;
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

// The columns of one stage that this lane multiplies, of one row of x.
template <class T, bool Norm>
struct Input {
  uint4 x[kChunks], norm[Norm ? kChunks : 1];

  // Zeros at and past column `end`.
  __device__ void load(const T* row, int32_t column, int32_t end) { load_into(x, row, column, end); }
  __device__ void load_norm(const void* weights, int32_t column, int32_t end) {
    if constexpr (Norm) load_into(norm, static_cast<const T*>(weights), column, end);
  }

  __device__ static void load_into(uint4 (&to)[kChunks], const T* from, int32_t column, int32_t end) {
#pragma unroll
    for (int i = 0; i < kChunks; ++i) {
      const int32_t k = column + 32 * i;
      to[i] = k < end ? *reinterpret_cast<const uint4*>(from + k) : uint4{};
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

// What becomes of the sums that are one thread's output of a unit; it is read before they are there.
template <class T>
struct Ending {
  float cos = 1, sin = 0, add = 0;

  __device__ Ending(const DecodeLinearParams& p, int32_t unit) {
    if (!writes(p)) return;
    const int64_t output = output_of(p, unit);
    if (rotates(p, unit)) {
      const int32_t half = static_cast<int32_t>(p.head_dim) / 2, sign = threadIdx.x < 64 ? -1 : 1;
      const int64_t angle = row() * p.head_dim + output % p.head_dim;
      cos = load(p.cos, angle);
      sin = sign * load(p.sin, angle);
      if (p.bias) add = load(p.bias, output) * cos + load(p.bias, output - sign * half) * sin;
    } else if (p.bias) {
      add = load(p.bias, output);
    }
    if (p.residual) add += load(p.residual, row() * p.out_features + output);
  }

  __device__ void write(const DecodeLinearParams& p, int32_t unit, const Sums* sums, const float (*squares)[8]) const {
    float scale = 1;
    if (squares) {
      float sum = 0;
#pragma unroll
      for (int warp = 0; warp < kWarps; ++warp) sum += squares[warp][row()];
      scale = rsqrtf(sum / static_cast<float>(p.in_features) + p.eps);
    }
    const auto total = [&](int32_t i) {
      float sum = 0;
#pragma unroll
      for (int warp = 0; warp < kWarps; ++warp) sum += sums[warp][i];
      return sum * scale;
    };
    float y = total(threadIdx.x);
    if (p.gated) y = silu(y) * total(64 + threadIdx.x);
    if (rotates(p, unit)) y = y * cos + total(threadIdx.x ^ 64) * sin;
    static_cast<T*>(p.out)[row() * p.out_features + output_of(p, unit)] = from_float<T>(y + add);
  }

  __device__ static bool writes(const DecodeLinearParams& p) {
    return threadIdx.x < (p.gated ? 64 : 128) && row() < p.rows;
  }
  __device__ static int64_t row() { return threadIdx.x % 64 / 8; }
  __device__ static int64_t output_of(const DecodeLinearParams& p, int32_t unit) {
    return weight_row(p, unit, threadIdx.x / 64 * 8 + threadIdx.x % 8);
  }
  __device__ static bool rotates(const DecodeLinearParams& p, int32_t unit) { return unit * kRows < p.rotated; }
  __device__ static float load(const void* from, int64_t i) { return to_float(static_cast<const T*>(from)[i]); }
};

#endif

// Held: a lane keeps all of x.
template <class T, bool Norm, bool Held>
__global__ void __launch_bounds__(kThreads, kBlocks)
    decode_linear_kernel(const __grid_constant__ DecodeLinearParams p) {
#if __CUDA_ARCH__ >= 900
  extern __shared__ __align__(16) unsigned char ring[];  // [kStages][kRows][kPitch]
  __shared__ Sums sums[2][kWarps];
  __shared__ float squares[kWarps][8];
  __shared__ Barrier full[kStages], empty[kStages];
  // A decode_linear that is next reads weights meanwhile. Attention, which follows a rotation, has nothing to read yet,
  // and its blocks would crowd on the few multiprocessors that have room: it starts when this kernel ends.
  if (p.rotated == 0) let_next_start();
  if (threadIdx.x == 0) {
    for (int i = 0; i < kStages; ++i) {
      barrier_init(full[i], kCopying);
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
  if (warp >= kWarps) {
    constexpr int kMine = kRows / kCopying;
    const int32_t r = (warp - kWarps) * kMine + lane;
    const uint64_t once = evict_first();
    const auto row_of = [&](int32_t unit) {
      return static_cast<const T*>(p.weight) + weight_row(p, unit, r) * p.in_features;
    };
    const auto bytes_of = [&](int32_t stage) { return 2 * min(kColumns, columns - stage * kColumns); };
    // From this stage on L2 can have what the ring has no room for, until x is there. Not before the ring has come, and
    // not all at once: the kernels ahead would wait for their loads behind it.
    const auto prefetch_from = [&](int32_t unit, int32_t stage) {
      const auto is_read = [&] { return barrier_is_over(empty[0], 0); };
      while (!barrier_is_over(full[kStages - 1], 0) && !is_read()) {
      }
      for (; unit < units; unit += gridDim.x, stage = 0) {
        for (; stage < stages; ++stage) {
          if (is_read()) return;
          if (lane < kMine) bulk_prefetch(row_of(unit) + stage * kColumns, bytes_of(stage));
          __nanosleep(kPause);
        }
      }
    };
    bool ring_was_full = false;
    for (int32_t unit = blockIdx.x; unit < units; unit += gridDim.x) {
      const T* const row = row_of(unit);
      for (int32_t stage = 0; stage < stages; ++stage) {
        if (parity == 1 && !ring_was_full) {
          ring_was_full = true;
          prefetch_from(unit, stage);
          __syncwarp();
        }
        barrier_wait(empty[slot], parity ^ 1);
        if (lane == 0) barrier_expect(full[slot], bytes_of(stage) * kMine);
        __syncwarp();
        if (lane < kMine) {
          bulk_copy(ring + (slot * kRows + r) * kPitch, row + stage * kColumns, bytes_of(stage), full[slot], once);
        }
        next();
      }
    }
    wait_for_previous();
    return;
  }
  const int32_t n = lane / 4, c = lane % 4, first = warp * kChunks * 32 + 8 * c;
  const T* const row = static_cast<const T*>(p.x) + n * p.in_features;
  const int32_t end = n < p.rows ? columns : 0;
  // A norm takes twice the registers until it has been applied.
  constexpr int kInputs = Held ? kHeld : Norm ? 1 : kAhead;
  Input<T, Norm> input[kInputs];
  float square = 0;
#pragma unroll
  for (int i = 0; i < kInputs; ++i) input[i].load_norm(p.norm, first + i * kColumns, end);
  wait_for_previous();
#pragma unroll
  for (int i = 0; i < kInputs; ++i) input[i].load(row, first + i * kColumns, end);
  if constexpr (Held) {
#pragma unroll
    for (int i = 0; i < kInputs; ++i) input[i].scale(square);
  }
  int32_t side = 0;
  for (int32_t unit = blockIdx.x; unit < units; unit += gridDim.x, side ^= 1) {
    const Ending<T> ending(p, unit);
    float acc[4] = {};
    for (int32_t begin = 0; begin < stages; begin += kInputs) {
#pragma unroll
      for (int i = 0; i < kInputs; ++i) {
        const int32_t stage = begin + i;
        if (stage >= stages) break;
        Input<T, Norm> present = input[i];
        if constexpr (!Held) {
          present.scale(square);
          // While weights come; behind the last ones, of the next unit.
          const int32_t ahead = stage + kInputs < stages ? stage + kInputs : i;
          input[i].load(row, first + ahead * kColumns, end);
          input[i].load_norm(p.norm, first + ahead * kColumns, end);
        }
        barrier_wait(full[slot], parity);
#pragma unroll
        for (int j = 0; j < kChunks; ++j) {
          const unsigned char* const at = ring + (slot * kRows + n) * kPitch + 2 * (first + 32 * j);
          uint4 low{}, high{};
          if (stage * kColumns + first + 32 * j < columns) {
            low = *reinterpret_cast<const uint4*>(at);
            high = *reinterpret_cast<const uint4*>(at + 8 * kPitch);
          }
          mma_chunk<T>(acc, low, high, present.x[j]);
        }
        __syncwarp();
        if (lane == 0) barrier_arrive(empty[slot]);
        next();
      }
      if (Held) break;
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
    if (ending.writes(p)) ending.write(p, unit, sums[side], Norm ? squares : nullptr);
  }
#endif
}

template <class T, bool Norm, bool Held>
void start(const DecodeLinearParams& p, const Launch& launch) {
  constexpr size_t bytes = static_cast<size_t>(kStages) * kRows * kPitch;
  constexpr auto kernel = decode_linear_kernel<T, Norm, Held>;
  allow_shared<kernel>(bytes);
  // As many blocks as fit. Fewer would not spread evenly: some multiprocessors would have two.
  const int64_t units = p.out_features / (p.gated ? 8 : kRows), most = kBlocks * current_device().sms;
  launch(kernel, dim3(static_cast<unsigned>(units < most ? units : most)), kThreads, bytes, 1, p);
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
  if (p.dtype == DType::kFloat16) return start<__half, false, false>(p, launch);
  if (!p.norm) return start<__nv_bfloat16, false, false>(p, launch);
  p.in_features <= kHeld* kColumns ? start<__nv_bfloat16, true, true>(p, launch)
                                   : start<__nv_bfloat16, true, false>(p, launch);
}

}  // namespace lil::cuda

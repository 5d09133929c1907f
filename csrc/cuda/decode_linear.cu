// decode_linear: a step reads every weight once, so what counts is that reading never pauses. Warps of each block copy
// weights into a ring of stages, from before the previous kernel has ended (weights are nobody's output), and eight
// warps multiply. A stage is some columns of a unit's rows of the weight, of which each warp has a part; at the end of
// the rows the warps' sums are added.
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

// The ring of a block whose units are so many rows of the weight, 16 or 8. Two blocks fit into a multiprocessor, of one
// kernel or of two.
constexpr int kBlocks = 2, kMostStages = 6, kFewerStages = 4;
template <int Rows>
struct Ring {
  static constexpr int kColumns = 8192 / Rows, kChunks = kColumns / 32 / kWarps;
  // Shared memory between two rows of a stage; eight lanes that load 16 bytes each of two rows meet all 32 banks once.
  static constexpr int kPitch = 2 * kColumns + 64;
  static constexpr int kStageBytes = Rows * kPitch;

  // Fewer with many rows of x: what shared memory does not take is L1, which holds loads of x on their way and what two
  // blocks read. Also on a device that has no room for more, one block a multiprocessor.
  static int32_t size(const DecodeLinearParams& p) {
    constexpr size_t most = kMostStages * kStageBytes, beside = 12 * 1024;
    return p.rows > 6 || current_device().max_shared < most + beside ? kFewerStages : kMostStages;
  }
};

// Stages of a block that are on their way at once. They keep memory busy; behind more of them other loads would wait in
// line: attention's, and those of x.
constexpr int kInFlight = 2;

// Nanoseconds between two stages that a block asks L2 for.
constexpr unsigned kPause = 600;

// Columns of x that a block keeps for all units, where that is all of x; or else has loaded before it needs them: half
// as many with a norm, which takes registers until it has been applied.
constexpr int kHeld = 2048;

#if __CUDA_ARCH__ >= 900

// Which row of the weight is row r of unit u. Units of 16: gated, eight rows of the gate, then the same eight of the
// other half; rotated, eight of a head's first half, then the eight that they turn with.
template <int Rows>
__device__ inline int64_t weight_row(const DecodeLinearParams& p, int32_t u, int32_t r) {
  if constexpr (Rows == 8) return static_cast<int64_t>(u) * 8 + r;
  if (p.gated) return u * 8 + r % 8 + (r / 8) * p.out_features;
  const int32_t head_dim = static_cast<int32_t>(p.head_dim), a_head = head_dim / Rows;
  if (u * Rows < p.rotated) return u / a_head * head_dim + u % a_head * 8 + r % 8 + (r / 8) * (head_dim / 2);
  return static_cast<int64_t>(u) * Rows + r;
}

__device__ inline float silu(float x) { return __fdividef(x, 1 + __expf(-x)); }

__device__ inline uint32_t product(uint32_t a, uint32_t b) {  // of pairs of bfloat16, rounded once
  asm("mul.rn.bf16x2 %0, %0, %1;" : "+r"(a) : "r"(b));
  return a;
}

// The columns of one stage that this lane multiplies: of a row of x, or of the norm.
template <class T, int Chunks>
struct Columns {
  uint4 data[Chunks];

  // Zeros at and past column `end`.
  __device__ void load(const T* row, int32_t column, int32_t end) {
#pragma unroll
    for (int i = 0; i < Chunks; ++i) {
      const int32_t k = column + 32 * i;
      data[i] = k < end ? *reinterpret_cast<const uint4*>(row + k) : uint4{};
    }
  }

  // Adds products of rows with each other to `squares`, of which the diagonal is what counts, two sums in turns; then
  // multiplies by `norm`.
  __device__ void scale(const Columns& norm, float (&squares)[2][4]) {
#pragma unroll
    for (int i = 0; i < Chunks; ++i) {
      mma<T>(squares[0], data[i].x, 0, data[i].y, 0, data[i].x, data[i].y);
      mma<T>(squares[1], data[i].z, 0, data[i].w, 0, data[i].z, data[i].w);
      data[i].x = product(data[i].x, norm.data[i].x);
      data[i].y = product(data[i].y, norm.data[i].y);
      data[i].z = product(data[i].z, norm.data[i].z);
      data[i].w = product(data[i].w, norm.data[i].w);
    }
  }
};

// Of one unit, [row of the weight / 8][row of x][row of the weight % 8].
using Sums = float[128];

// Of the mean square of a row of x, whose warps' sums of squares are given.
__device__ inline float inverse_root(const DecodeLinearParams& p, const float (&squares)[kWarps][8], int64_t row) {
  float sum = 0;
#pragma unroll
  for (const auto& of_warp : squares) sum += of_warp[row];
  return rsqrtf(sum / static_cast<float>(p.in_features) + p.eps);
}

// What becomes of the sums that are one thread's output of a unit. What it takes is asked for before the sums are
// there, and kept as it is stored: any use would wait for it.
template <class T, int Rows>
struct Ending {
  T cos, sin, bias, turned_bias, residual;

  __device__ Ending(const DecodeLinearParams& p, int32_t unit) {
    if (!writes(p)) return;
    const int64_t output = output_of(p, unit);
    const auto load = [](const void* from, int64_t i) { return static_cast<const T*>(from)[i]; };
    if (p.bias) bias = load(p.bias, output);
    if (rotates(p, unit)) {
      const int64_t angle = row() * p.head_dim + static_cast<int32_t>(output) % static_cast<int32_t>(p.head_dim);
      cos = load(p.cos, angle);
      sin = load(p.sin, angle);
      if (p.bias) turned_bias = load(p.bias, output - sign() * (static_cast<int32_t>(p.head_dim) / 2));
    }
    if (p.residual) residual = load(p.residual, row() * p.out_features + output);
  }

  __device__ void write(const DecodeLinearParams& p, int32_t unit, const Sums* sums, float scale) const {
    const auto total = [&](int32_t i) {
      float sum = 0;
#pragma unroll
      for (int warp = 0; warp < kWarps; ++warp) sum += sums[warp][i];
      return sum * scale;
    };
    float y = total(threadIdx.x), add = p.bias ? to_float(bias) : 0;
    if (p.gated) y = silu(y) * total(64 + threadIdx.x);
    if (rotates(p, unit)) {
      const float c = to_float(cos), s = static_cast<float>(sign()) * to_float(sin);
      y = y * c + total(threadIdx.x ^ 64) * s;
      if (p.bias) add = add * c + to_float(turned_bias) * s;
    }
    if (p.residual) add += to_float(residual);
    static_cast<T*>(p.out)[row() * p.out_features + output_of(p, unit)] = from_float<T>(y + add);
  }

  __device__ static bool writes(const DecodeLinearParams& p) {
    return threadIdx.x < (p.gated ? 64 : 8 * Rows) && row() < p.rows;
  }
  __device__ static int64_t row() { return threadIdx.x % 64 / 8; }
  __device__ static int64_t output_of(const DecodeLinearParams& p, int32_t unit) {
    return weight_row<Rows>(p, unit, threadIdx.x / 64 * 8 + threadIdx.x % 8);
  }
  __device__ static bool rotates(const DecodeLinearParams& p, int32_t unit) {
    return Rows == 16 && unit * Rows < p.rotated;
  }
  __device__ static int32_t sign() { return threadIdx.x < 64 ? -1 : 1; }
};

#endif

// Held: a lane keeps all of x. ring_size: in stages.
template <class T, bool Norm, bool Held, int Rows>
__global__ void __launch_bounds__(kThreads, kBlocks)
    decode_linear_kernel(const __grid_constant__ DecodeLinearParams p, const int32_t ring_size) {
#if __CUDA_ARCH__ >= 900
  constexpr int kColumns = Ring<Rows>::kColumns, kChunks = Ring<Rows>::kChunks, kPitch = Ring<Rows>::kPitch;
  extern __shared__ __align__(16) unsigned char ring[];  // [ring_size][Rows][kPitch]
  __shared__ Sums sums[2][kWarps];
  __shared__ float squares[kWarps][8];
  __shared__ Barrier full[kMostStages], empty[kMostStages];
  // A decode_linear that is next reads weights meanwhile. Attention, which follows a rotation, has nothing to read yet,
  // and its blocks would crowd on the few multiprocessors that have room: it starts when this kernel ends.
  if (p.rotated == 0) let_next_start();
  if (threadIdx.x == 0) {
    for (int i = 0; i < kMostStages; ++i) {
      barrier_init(full[i], kCopying);
      barrier_init(empty[i], kMultiplying);
    }
    barriers_are_ready();
  }
  __syncthreads();
  const int32_t warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int32_t columns = static_cast<int32_t>(p.in_features), stages = (columns + kColumns - 1) / kColumns;
  const int32_t units = static_cast<int32_t>(p.out_features) / (p.gated ? 8 : Rows);
  int32_t slot = 0;
  uint32_t parity = 0;
  const auto next = [&] {
    if (++slot == ring_size) {
      slot = 0;
      parity ^= 1;
    }
  };
  if (warp >= kWarps) {
    constexpr int kMine = Rows / kCopying;
    const int32_t r = (warp - kWarps) * kMine + lane;
    const uint64_t once = evict_first();
    const auto row_of = [&](int32_t unit) {
      return static_cast<const T*>(p.weight) + weight_row<Rows>(p, unit, r) * p.in_features;
    };
    const auto bytes_of = [&](int32_t stage) { return 2 * min(kColumns, columns - stage * kColumns); };
    // From this stage on L2 can have what the ring has no room for, until x is there. Not before the ring has come, and
    // not all at once: the kernels ahead would wait for their loads behind it. A layer of fewer outputs than inputs is
    // taken for the second of two, behind one that has memory busy.
    const bool reads_ahead = p.in_features <= p.out_features;
    const auto prefetch_from = [&](int32_t unit, int32_t stage) {
      const auto is_read = [&] { return barrier_is_over(empty[0], 0); };
      while (!barrier_is_over(full[ring_size - 1], 0) && !is_read()) {
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
          if (reads_ahead) prefetch_from(unit, stage);
          __syncwarp();
        }
        barrier_wait(empty[slot], parity ^ 1);
        // Until the stage kInFlight before this one has come, in this turn of the ring or in the last: before the
        // first, a barrier takes that for over.
        const bool turned = slot < kInFlight;
        barrier_wait(full[turned ? slot + ring_size - kInFlight : slot - kInFlight], turned ? parity ^ 1 : parity);
        if (lane == 0) barrier_expect(full[slot], bytes_of(stage) * kMine);
        __syncwarp();
        if (lane < kMine) {
          bulk_copy(ring + (slot * Rows + r) * kPitch, row + stage * kColumns, bytes_of(stage), full[slot], once);
        }
        next();
      }
    }
    wait_for_previous();
    return;
  }
  const int32_t n = lane / 4, c = lane % 4, first = warp * kChunks * 32 + 8 * c;
  const T *const row = static_cast<const T*>(p.x) + n * p.in_features, *const norms = static_cast<const T*>(p.norm);
  const int32_t end = n < p.rows ? columns : 0;
  constexpr int kInputs = kHeld / (Norm && !Held ? 2 : 1) / kColumns, kNorms = Held ? kInputs : 1;
  Columns<T, kChunks> x[kInputs], norm[kNorms];
  float square[2][4] = {};
  if constexpr (Norm) {
#pragma unroll
    for (int i = 0; i < kNorms; ++i) norm[i].load(norms, first + i * kColumns, end);
  }
  wait_for_previous();
#pragma unroll
  for (int i = 0; i < kInputs; ++i) x[i].load(row, first + i * kColumns, end);
  Ending<T, Rows> ending(p, blockIdx.x);
  if constexpr (Norm && Held) {
#pragma unroll
    for (int i = 0; i < kInputs; ++i) x[i].scale(norm[i], square);
  }
  const unsigned char* const mine = ring + n * kPitch + 2 * first;
  int32_t side = 0;
  float root = 1;  // what the sums are multiplied by
#pragma unroll 1
  for (int32_t unit = blockIdx.x; unit < units; unit += gridDim.x, side ^= 1) {
    if (unit != blockIdx.x) ending = Ending<T, Rows>(p, unit);
    float acc[2][4] = {};  // of chunks in turn: a product does not wait for the one before it
    int32_t left = columns - first;
#pragma unroll 1
    for (int32_t begin = 0; begin < stages; begin += kInputs) {
#pragma unroll
      for (int i = 0; i < kInputs; ++i) {
        const int32_t stage = begin + i;
        if (stage >= stages) break;
        if constexpr (Norm && !Held) {
          x[i].scale(norm[0], square);
          norm[0].load(norms, first + (stage + 1 < stages ? stage + 1 : 0) * kColumns, end);
        }
        barrier_wait(full[slot], parity);
        const unsigned char* const at = mine + slot * Ring<Rows>::kStageBytes;
#pragma unroll
        for (int j = 0; j < kChunks; ++j) {
          uint4 low{}, high{};
          if (32 * j < left) {
            low = *reinterpret_cast<const uint4*>(at + 64 * j);
            if constexpr (Rows > 8) high = *reinterpret_cast<const uint4*>(at + 64 * j + 8 * kPitch);
          }
          mma_chunk<T>(acc[j % 2], low, high, x[i].data[j]);
        }
        reads_are_done();
        barrier_arrive(empty[slot]);
        next();
        left -= kColumns;
        // Behind the last stages, of the next unit.
        if constexpr (!Held) x[i].load(row, first + (stage + kInputs < stages ? stage + kInputs : i) * kColumns, end);
      }
      if (Held) break;
    }
    float* const my_sums = sums[side][warp];
#pragma unroll
    for (int i = 0; i < Rows / 4; ++i) my_sums[i / 2 * 64 + (2 * c + i % 2) * 8 + n] = acc[0][i] + acc[1][i];
    // Of the same x for every unit.
    if (Norm && unit == blockIdx.x && c == n / 2) {
      squares[warp][n] = n % 2 ? square[0][1] + square[1][1] : square[0][0] + square[1][0];
    }
    // The multiplying warps alone. The other side's sums have been read by all who come here.
    asm volatile("bar.sync 1, %0;" ::"n"(kMultiplying) : "memory");
    if (ending.writes(p)) {
      if (Norm && unit == blockIdx.x) root = inverse_root(p, squares, ending.row());
      ending.write(p, unit, sums[side], root);
    }
  }
#endif
}

template <class T, bool Norm, bool Held, int Rows>
void start(const DecodeLinearParams& p, const Launch& launch) {
  const int32_t ring_size = Ring<Rows>::size(p);
  const size_t bytes = static_cast<size_t>(ring_size) * Ring<Rows>::kStageBytes;
  constexpr auto kernel = decode_linear_kernel<T, Norm, Held, Rows>;
  allow_shared<kernel>(bytes);
  // As many blocks as fit. Fewer would not spread evenly: some multiprocessors would have two.
  const int64_t units = p.out_features / (p.gated ? 8 : Rows), most = kBlocks * current_device().sms;
  launch(kernel, dim3(static_cast<unsigned>(units < most ? units : most)), kThreads, bytes, 1, p, ring_size);
}

// Without a norm. Units of 8 rows where those of 16 are more than the largest ring holds, and at most half as many as
// the blocks that fit: twice the blocks fill twice the rings ahead.
template <class T>
void start_plain(const DecodeLinearParams& p, const Launch& launch) {
  const bool few = p.out_features / 8 <= kBlocks * current_device().sms;
  const bool large = p.in_features > kMostStages * Ring<16>::kColumns;
  few && large && !p.gated && p.rotated == 0 ? start<T, false, false, 8>(p, launch)
                                             : start<T, false, false, 16>(p, launch);
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
  if (p.dtype == DType::kFloat16) return start_plain<__half>(p, launch);
  if (!p.norm) return start_plain<__nv_bfloat16>(p, launch);
  p.in_features <= kHeld ? start<__nv_bfloat16, true, true, 16>(p, launch)
                         : start<__nv_bfloat16, true, false, 16>(p, launch);
}

}  // namespace lil::cuda

// The sticky error word: one a device. A kernel that meets a value out of range skips the entry and notes the first
// such value here; nobody waits for it. lil_ops.check_errors() reads and clears it.
#pragma once

#include <cstdint>

namespace lil::cuda {

enum class Op : int32_t {
  kAppendKv,
  kScorePages,
  kSelectPages,
  kSparseDecode,
  kInformationLoss,
  kEvictPages,
  kRepresentPage,
  kCompactKv,
  kKeyRedundancy,
  kLz77Append
};

enum class Wrong : int32_t {
  kNothing,
  kSeqLens,
  kSeqLensShort,
  kCuSeqlens,
  kPageTable,
  kPages,
  kCounts,
  kSlots,
  kHeld,
  kSlotPages,
  kKeep,
  kKeepCounts,
  kPositions,
  kPositionsShort,
  kTokens,
  kTokenCounts,
  kRoom,
  kState
};

struct ErrorWord {
  Wrong wrong;
  Op op;
  int32_t sequence, got, limit;
};

// Of the current device.
ErrorWord* error_word();

#if defined(__CUDACC__)
__device__ inline void report(ErrorWord* word, Op op, Wrong wrong, int64_t sequence, int64_t got, int64_t limit) {
  static_assert(sizeof(Wrong) == sizeof(int));
  if (atomicCAS(reinterpret_cast<int*>(&word->wrong), 0, static_cast<int>(wrong)) != 0) return;
  word->op = op;
  word->sequence = static_cast<int32_t>(sequence);
  word->got = static_cast<int32_t>(got);
  word->limit = static_cast<int32_t>(limit);
}
#endif

}  // namespace lil::cuda

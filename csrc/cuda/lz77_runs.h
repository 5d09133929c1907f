// One diagonal of the comparison of a sequence with itself: the tokens at i and at i - d, for all i in their order and
// one d. A maximal run of equal ones says that what it covers occurs d tokens earlier.
#pragma once

#include <cstdint>

#include "host_device.h"

namespace lil::cuda {

// What is known of the 32 positions of a word: which have no match yet, and how long a run must at least be to be
// longer than the match that any of the others has, 2 to 32.
struct Known {
  uint32_t unmatched;
  int32_t least;
};

class Diagonal {
 public:
  // A run that is on its way from further back began at `start`.
  LIL_HOST_DEVICE void enter(int32_t start) {
    start_ = start;
    last_ = ~0u;
  }

  LIL_HOST_DEVICE bool in_run() const { return last_ >> 31; }
  LIL_HOST_DEVICE int32_t run_start() const { return start_; }

  // The next 32 positions, from `base` on; `known` of them, and of those before. found(start, end) is called at the end
  // of each run that can be longer than what is known. run_start() is then of the run that covers the bit `last`: the
  // highest, but in the last word.
  template <class Found>
  LIL_HOST_DEVICE void step(uint32_t equal, int32_t base, Known before, Known known, uint32_t last, Found&& found) {
    const uint32_t one = equal << 1 | last_ >> 31, two = equal << 2 | last_ >> 30;  // what precedes each place
    const uint32_t fresh = (equal & known.unmatched) | (last_ & before.unmatched);
    if (fresh | (~equal & one & two)) {
      const uint32_t starts = equal & ~one;
      uint32_t ends = ~equal & one;
      if (!fresh) ends &= after_runs(equal, before.least < known.least ? before.least : known.least);
      for (; ends; ends &= ends - 1) {
        const int32_t bit = trailing_zeros(ends);
        const uint32_t below = starts & ((1u << bit) - 1);
        found(below ? top(below, base) : start_, base + bit);
      }
    }
    if (equal & last) {
      if (const uint32_t starts = equal & ~one) start_ = top(starts, base);
    }
    last_ = equal;
  }

 private:
  uint32_t last_ = 0;  // the word before
  int32_t start_ = 0;  // of the run that covers its highest bit

  LIL_HOST_DEVICE static int32_t top(uint32_t bits, int32_t base) { return base + 31 - leading_zeros(bits); }

  // Places right after at least `length` equal ones, 32 at most. Unrolled, so that it shifts by constants.
  LIL_HOST_DEVICE uint32_t after_runs(uint32_t equal, int32_t length) const {
    uint64_t runs = static_cast<uint64_t>(equal) << 32 | last_;
    int32_t reached = 1;
#pragma unroll
    for (int32_t doubled = 2; doubled <= 32; doubled *= 2) {
      if (doubled > length) break;
      runs &= runs << doubled / 2;
      reached = doubled;
    }
    runs &= runs << (length - reached);
    return static_cast<uint32_t>(runs << 1 >> 32);
  }
};

}  // namespace lil::cuda

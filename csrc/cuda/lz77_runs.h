// One diagonal of the comparison of a sequence with itself: the tokens at i and at i - d, for all i in their order and
// one d. A maximal run of equal ones says that what it covers occurs d tokens earlier.
#pragma once

#include <cstdint>

#include "host_device.h"

namespace lil::cuda {

// What is known of the 32 positions of a word: which have no match yet, and how long a run must at least be to be
// longer than the match that any of the others has. At most 32.
struct Known {
  uint32_t unmatched;
  int32_t least;
};

class Diagonal {
 public:
  // A run is on its way that began at `start`, or before: it is longer than whatever is known.
  LIL_HOST_DEVICE void enter(int32_t start) {
    start_ = start - 32;
    last_ = ~0u;
  }

  LIL_HOST_DEVICE bool in_run() const { return last_ >> 31; }
  LIL_HOST_DEVICE int32_t run_start() const { return start_; }

  // The next 32 positions, from `base` on; `known` of them, and of those before. found(start, end) is called at the end
  // of each run that can be longer than what is known.
  template <class Found>
  LIL_HOST_DEVICE void step(uint32_t equal, int32_t base, Known before, Known known, Found&& found) {
    const uint32_t shifted = equal << 1 | last_ >> 31;
    const uint32_t starts = equal & ~shifted;
    uint32_t ends = ~equal & shifted;  // one past a run
    if (ends) {
      const uint32_t fresh = (equal & known.unmatched) | (in_run() ? last_ & before.unmatched : 0);
      if (!fresh) ends &= after_runs(equal, base, before.least < known.least ? before.least : known.least);
      for (; ends; ends &= ends - 1) {
        const int32_t bit = trailing_zeros(ends);
        const uint32_t below = starts & ((1u << bit) - 1);
        found(below ? top(below, base) : start_, base + bit);
      }
    }
    if (starts) start_ = top(starts, base);
    last_ = equal;
  }

 private:
  uint32_t last_ = 0;  // the word before
  int32_t start_ = 0;  // of the last run so far

  LIL_HOST_DEVICE static int32_t top(uint32_t bits, int32_t base) { return base + 31 - leading_zeros(bits); }

  // Places right after at least `length` equal ones (1 to 32), where `equal` has another.
  LIL_HOST_DEVICE uint32_t after_runs(uint32_t equal, int32_t base, int32_t length) const {
    uint32_t runs = equal;
    int32_t reached = 1;
#pragma unroll
    for (int32_t twice = 2; twice <= 16; twice *= 2) {
      if (length >= twice) runs &= runs << reached, reached = twice;
    }
    runs &= runs << (length - reached);
    const int32_t first = trailing_zeros(~equal);
    const bool long_so_far = in_run() && base + first - start_ >= length;
    return runs << 1 | static_cast<uint32_t>(long_so_far) << first;
  }
};

}  // namespace lil::cuda

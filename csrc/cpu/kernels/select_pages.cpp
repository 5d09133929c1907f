// Selection without sorting: the K-th largest score is found by bisection over the integers that order like floats
// (each pass is a vectorised count), then one scan in page order writes the chosen pages, already ascending.
#include "cpu/kernels/table.h"
#include "cpu/kernels/vec.h"

namespace lil::cpu::LIL_ISA {
namespace {

// Integers in the order of the floats that are not NaN, and back.
uint32_t key_of(float x) {
  uint32_t bits;
  memcpy(&bits, &x, sizeof bits);
  return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

float float_of(uint32_t key) {
  const uint32_t bits = key & 0x80000000u ? key & 0x7fffffffu : ~key;
  float x;
  memcpy(&x, &bits, sizeof x);
  return x;
}

// Calls f(vector, index of its first score, bits of its valid lanes) over scores[0, n).
template <class F>
inline void for_each_vector(const float* scores, int64_t n, F f) {
  int64_t i = 0;
  for (; i + Vec::N <= n; i += Vec::N) f(Vec::load(scores + i), i, 0xffffffffu >> (32 - Vec::N));
  if (i < n) {
    float tail[Vec::N];
    for (int64_t j = 0; j < Vec::N; ++j) tail[j] = i + j < n ? scores[i + j] : 0;
    f(Vec::load(tail), i, (1u << (n - i)) - 1);
  }
}

int64_t count_not_less(const float* scores, int64_t n, float pivot) {
  int64_t count = 0;
  for_each_vector(scores, n, [&](Vec x, int64_t, uint32_t valid) {
    count += __builtin_popcount(x.not_less(Vec::set1(pivot)) & valid);
  });
  return count;
}

int32_t* write_pages(uint32_t lanes, int32_t first, int32_t* out) {
  for (; lanes; lanes &= lanes - 1) *out++ = first + __builtin_ctz(lanes);
  return out;
}

// Appends to `out` the `k` best of scores[0, n), NaN first, lower pages first among equals; 0 < k < n.
int32_t* take_best(const float* scores, int64_t n, int64_t k, int32_t first_page, int32_t* out) {
  // NaN is not less than infinity, and not equal to it.
  const Vec infinity = Vec::set1(INFINITY);
  int64_t nans = 0;
  for_each_vector(scores, n, [&](Vec x, int64_t, uint32_t valid) {
    nans += __builtin_popcount(x.not_less(infinity) & ~x.equal(infinity) & valid);
  });
  // Invariant: at least k scores are not less than `low`, fewer than k are above `high`. It ends at the k-th best, or
  // earlier where exactly k scores reach `low`.
  uint32_t low = key_of(-INFINITY), high = key_of(INFINITY);
  int64_t reached = n;
  while (low < high && reached != k) {
    const uint32_t middle = low + (high - low) / 2 + 1;
    const int64_t count = count_not_less(scores, n, float_of(middle));
    if (count >= k) {
      low = middle;
      reached = count;
    } else {
      high = middle - 1;
    }
  }
  // Above the pivot everything is taken; of the equals (or of the NaN, where they alone fill the budget) the first.
  const bool only_nan = nans >= k;
  const Vec pivot = Vec::set1(float_of(low));
  int64_t room = k;
  for_each_vector(scores, n, [&](Vec x, int64_t, uint32_t valid) {
    room -= only_nan ? 0 : __builtin_popcount(x.not_less(pivot) & ~x.equal(pivot) & valid);
  });
  for_each_vector(scores, n, [&](Vec x, int64_t i, uint32_t valid) {
    const uint32_t above = x.not_less(only_nan ? infinity : pivot) & ~x.equal(only_nan ? infinity : pivot) & valid;
    uint32_t ties = (only_nan ? above : x.equal(pivot)) & valid;
    while (__builtin_popcount(ties) > room) ties &= ~(0x80000000u >> __builtin_clz(ties));
    room -= __builtin_popcount(ties);
    out = write_pages(only_nan ? ties : above | ties, first_page + static_cast<int32_t>(i), out);
  });
  return out;
}

void select_one(const SelectPagesParams& p, int64_t b, int64_t h) {
  int32_t* const out = p.pages + (b * p.kv_heads + h) * p.capacity;
  const int64_t length = p.seq_lens[b], pages = (length + p.page_size - 1) / p.page_size;
  int32_t* next = out;
  if (pages <= p.capacity) {
    for (int64_t page = 0; page < pages; ++page) *next++ = static_cast<int32_t>(page);
  } else {
    // Recent pages come first in the budget, then the head of the sequence, then the best of the rest.
    const int64_t recent = (length - (p.recent < length ? p.recent : length)) / p.page_size;
    const int64_t protect = p.protected_lens && p.protected_lens[b] > p.sink ? p.protected_lens[b] : p.sink;
    int64_t head = (protect + p.page_size - 1) / p.page_size, room = p.capacity - (pages - recent);
    head = head < recent ? head : recent;
    head = head < room ? head : room;
    for (int64_t page = 0; page < head; ++page) *next++ = static_cast<int32_t>(page);
    if (room > head) {
      const float* scores = p.scores + b * p.stride_b + h * p.stride_h;
      next = take_best(scores + head, recent - head, room - head, static_cast<int32_t>(head), next);
    }
    for (int64_t page = recent; page < pages; ++page) *next++ = static_cast<int32_t>(page);
  }
  p.counts[b * p.kv_heads + h] = static_cast<int32_t>(next - out);
  while (next < out + p.capacity) *next++ = -1;
}

}  // namespace

void select_pages(const SelectPagesParams& p, int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end; ++i) select_one(p, i / p.kv_heads, i % p.kv_heads);
}

}  // namespace lil::cpu::LIL_ISA

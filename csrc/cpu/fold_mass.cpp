#include "fold_mass.h"

#include <algorithm>
#include <vector>

#include "cpu/backend.h"
#include "cpu/values.h"

namespace lil::cpu {
namespace {

// Sums the query heads of KV head h (shared: of all), in their order, slot by slot.
void sum_heads(const FoldMassParams& p, int64_t b, int64_t h, float* sum) {
  const int64_t slots = std::min(p.capacity, p.entries), first = b * p.q_heads + h * p.group;
  std::fill_n(sum, p.capacity, 0.0f);
  for (int64_t i = 0; i < (p.shared ? p.q_heads : p.group); ++i) {
    const float* const mass = p.mass + ((p.shared ? b * p.q_heads : first) + i) * p.entries;
    for (int64_t s = 0; s < slots; ++s) sum[s] += mass[s];
  }
}

void fold_head(const FoldMassParams& p, int64_t b, int64_t h, const float* mass) {
  const int64_t first = (b * p.kv_heads + h) * p.capacity;
  const int32_t* const held = p.held + first;
  const int32_t length = p.seq_lens[b];
  float* const priority = p.priority + first;
  if (p.rule != FoldRule::kStamp) {
    for (int64_t s = 0; s < p.capacity; ++s) priority[s] = folded(p, priority[s], mass[s], held[s], length);
    return;
  }
  const int64_t count = std::count_if(held, held + p.capacity, [](int32_t page) { return page >= 0; });
  for (int64_t s = 0; s < p.capacity; ++s) {
    const float mine = mass[s];
    int32_t more = 0;
    // Without branches, so that it is done several at a time.
    for (int64_t other = 0; other < p.capacity; ++other) more += (held[other] >= 0) & (mass[other] > mine);
    if (stamps(p, held[s], length, more, count)) priority[s] = static_cast<float>(length);
  }
}

}  // namespace

void fold_mass(const FoldMassParams& p, const Tensor&) {
  check_seq_lens("fold_mass", p.seq_lens, p.batch, INT32_MAX);
  constexpr int64_t kGrain = 16;  // a head of a thousand slots is some microseconds
  torch::stable::parallel_for(0, p.batch * p.kv_heads, kGrain, [&](int64_t begin, int64_t end) {
    static thread_local std::vector<float> mass;
    mass.resize(std::max<size_t>(mass.size(), p.capacity));
    for (int64_t i = begin; i < end; ++i) {
      const int64_t b = i / p.kv_heads, h = i % p.kv_heads;
      // Shared by the heads of a sequence: summed for the first that this thread meets.
      if (!p.shared || h == 0 || i == begin) sum_heads(p, b, h, mass.data());
      fold_head(p, b, h, mass.data());
    }
  });
}

}  // namespace lil::cpu

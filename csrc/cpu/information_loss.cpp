#include <algorithm>
#include <vector>

#include "cpu/backend.h"
#include "cpu/kernels/kernels.h"
#include "cpu/values.h"

namespace lil::cpu {

void information_loss(const InformationLossParams& p, const Tensor&) {
  const char* op = "information_loss";
  check_seq_lens(op, p.seq_lens, p.batch, p.max_pages * p.page_size);
  for (int64_t b = 0; b < p.batch; ++b) {
    const int64_t pages = pages_of(p.seq_lens[b], p.page_size);
    for (int64_t h = 0; h < p.kv_heads; ++h) {
      const int64_t count = checked_count(op, p.counts, p.capacity, b, h, p.kv_heads);
      const int32_t* list = p.pages + b * p.pages_stride_b + h * p.pages_stride_h;
      for (int64_t i = 0; i < count; ++i) check_listed_page(op, list[i], pages, b, h);
    }
  }
  // Below some thousands of scores a thread costs more than it saves.
  const int64_t grain = std::max<int64_t>(1, 4096 / std::max<int64_t>(1, p.max_pages));
  const Kernels& isa = kernels();
  torch::stable::parallel_for(0, p.batch * p.kv_heads, grain, [&](int64_t begin, int64_t end) {
    thread_local std::vector<float> scratch;  // grows to the largest call and stays
    scratch.resize(p.max_pages + kLossPadding);
    isa.information_loss(p, scratch.data(), begin, end);
  });
}

}  // namespace lil::cpu

// The mass U of what was not read is the sum of tokens * exp(score) over the unread pages. Its logarithm is computed,
// then each query head's U / (U + exp(lse)).
#include "cpu/kernels/table.h"
#include "cpu/kernels/vec.h"

namespace lil::cpu::LIL_ISA {
namespace {

// One (sequence, KV head)'s capped scores of pages [0, pages), -inf where a page was read and up to a whole vector.
void gather_unread(const InformationLossParams& p, int64_t b, int64_t h, int64_t pages, float* unread) {
  const float* const scores = p.scores + b * p.stride_b + h * p.stride_h;
  memcpy(unread, scores, pages * sizeof(float));
  if (p.softcap > 0) {
    const Vec cap = Vec::set1(p.softcap);
    for (int64_t i = 0; i < pages; i += Vec::N) (cap * tanh(Vec::load(unread + i) / cap)).store(unread + i);
    // That of a page that is not mapped has no cap: nothing is there.
    for (int64_t i = 0; i < pages; ++i) unread[i] = scores[i] == -INFINITY ? -INFINITY : unread[i];
  }
  for (int64_t i = pages; i % Vec::N; ++i) unread[i] = -INFINITY;
  const int32_t* const list = p.pages + b * p.pages_stride_b + h * p.pages_stride_h;
  const int64_t count = p.counts ? p.counts[b * p.kv_heads + h] : p.capacity;
  for (int64_t i = 0; i < count; ++i) {
    if (list[i] >= 0) unread[list[i]] = -INFINITY;
  }
}

// log(sum exp(x)) of whole vectors, NaN where one is NaN. An infinity is its own result.
float log_sum_exp(const float* x, int64_t count) {
  Vec high = Vec::set1(-INFINITY);
  for (int64_t i = 0; i < count; i += Vec::N) high = Vec::max(high, Vec::load(x + i));
  const float max = high.largest();
  const Vec base = Vec::set1(max - max == 0 ? max : 0);
  Vec sum = Vec::zero();
  for (int64_t i = 0; i < count; i += Vec::N) sum = sum + exp(Vec::min(Vec::load(x + i) - base, Vec::zero()));
  return max + logf(sum.sum());
}

// log U: -inf where nothing is unread.
float log_unread(const InformationLossParams& p, int64_t b, int64_t h, float* scratch) {
  const int64_t length = p.seq_lens[b], pages = (length + p.page_size - 1) / p.page_size;
  if (pages == 0) return -INFINITY;
  gather_unread(p, b, h, pages, scratch);
  // The last page is a share of a page.
  const float page_size = static_cast<float>(p.page_size);
  scratch[pages - 1] += logf(static_cast<float>(length - (pages - 1) * p.page_size) / page_size);
  return log_sum_exp(scratch, pages) + logf(page_size);
}

}  // namespace

void information_loss(const InformationLossParams& p, float* scratch, int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end; ++i) {
    const float unread = log_unread(p, i / p.kv_heads, i % p.kv_heads, scratch);
    for (int64_t row = i * p.group; row < (i + 1) * p.group; ++row) {
      p.loss[row] = unread == -INFINITY ? 0 : 1 / (1 + expf(p.lse[row] - unread));
    }
  }
}

}  // namespace lil::cpu::LIL_ISA

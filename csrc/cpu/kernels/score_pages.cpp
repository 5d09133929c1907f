// minmax: no key of a page has a larger q . k than sum_d max(q_d * min_d, q_d * max_d). That is one dot product of
// [min(q, 0), max(q, 0)] with the page's [min, max].
#include "cpu/kernels/dot.h"
#include "cpu/kernels/table.h"

namespace lil::cpu::LIL_ISA {
namespace {

constexpr int64_t kMaxHeadDim = 256;

template <class T, class Q>
void score_block(const ScorePagesParams& p, int64_t b, int64_t h, int64_t first, int64_t last, float* scores) {
  const T* rows[kScoreBlock];
  int32_t where[kScoreBlock];
  int64_t count = 0;
  for (int64_t page = first; page < last; ++page) {
    const int64_t physical = p.pages.at(b, h, page);
    scores[page] = -INFINITY;
    if (physical < 0) continue;  // not mapped
    rows[count] = static_cast<const T*>(p.summary.data) + physical * p.summary.stride_page + h * p.summary.stride_head;
    where[count++] = static_cast<int32_t>(page);
  }
  float queries[Vec::kHeadTile * 2 * kMaxHeadDim], out[Vec::kHeadTile * kScoreBlock] = {}, best[kScoreBlock];
  for (float& score : best) score = -INFINITY;
  for (int64_t g = 0; g < p.group; g += Vec::kHeadTile) {
    const int64_t heads = p.group - g < Vec::kHeadTile ? p.group - g : Vec::kHeadTile;
    for (int64_t i = 0; i < heads; ++i) {
      const Q* q = static_cast<const Q*>(p.q) + b * p.q_stride_b + (h * p.group + g + i) * p.q_stride_h;
      float* query = queries + i * 2 * p.head_dim;
      for (int64_t d = 0; d < p.head_dim; d += Vec::N) {
        const Vec x = Vec::load(q + d) * Vec::set1(p.scale);
        Vec::min(x, Vec::zero()).store(query + d);
        Vec::max(x, Vec::zero()).store(query + p.head_dim + d);
      }
    }
    dots(rows, count, queries, heads, 2 * p.head_dim, out, kScoreBlock);
    for (int64_t i = 0; i < heads; ++i) {
      for (int64_t t = 0; t < kScoreBlock; t += Vec::N) {
        Vec::max(Vec::load(best + t), Vec::load(out + i * kScoreBlock + t)).store(best + t);
      }
    }
  }
  for (int64_t t = 0; t < count; ++t) scores[where[t]] = best[t];
}

}  // namespace

void score_pages(const ScorePagesParams& p, int64_t begin, int64_t end) {
  const int64_t blocks = (p.pages.max_pages + kScoreBlock - 1) / kScoreBlock;
  with_dtype(p.summary_dtype, [&]<class T>(const T*) {
    with_dtype(p.q_dtype, [&]<class Q>(const Q*) {
      for (int64_t i = begin; i < end; ++i) {
        // Heads vary fastest: the summaries of a page's heads lie side by side.
        const int64_t h = i % p.kv_heads, block = i / p.kv_heads % blocks, b = i / p.kv_heads / blocks;
        const int64_t pages = (p.seq_lens[b] + p.page_size - 1) / p.page_size;
        const int64_t first = block * kScoreBlock, stop = first + kScoreBlock;
        const int64_t last = stop < p.pages.max_pages ? stop : p.pages.max_pages;
        const int64_t filled = pages < first ? first : pages < last ? pages : last;
        float* scores = p.scores + (b * p.kv_heads + h) * p.pages.max_pages;
        if (filled > first) score_block<T, Q>(p, b, h, first, filled, scores);
        for (int64_t page = filled; page < last; ++page) scores[page] = -INFINITY;
      }
    });
  });
}

}  // namespace lil::cpu::LIL_ISA

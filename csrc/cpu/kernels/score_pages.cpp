// minmax: no key of a page has a larger q . k than sum_d max(q_d * min_d, q_d * max_d). That is one dot product of
// [min(q, 0), max(q, 0)] with the page's [min, max].
#include "cpu/kernels/dot.h"
#include "cpu/kernels/table.h"

namespace lil::cpu::LIL_ISA {
namespace {

constexpr int64_t kMaxHeadDim = 256;

// The summaries of one block of pages of one (sequence, KV head): those that exist and are mapped.
template <class T>
struct BlockRows {
  const T* rows[kScoreBlock];
  int32_t where[kScoreBlock];                // their pages
  int64_t count, b, h, first, filled, last;  // pages [first, last) of the table, of which those up to `filled` exist

  BlockRows() {}  // the arrays stay as they are until gather

  // Heads vary fastest over the items: the summaries of a page's heads lie side by side.
  void gather(const ScorePagesParams& p, int64_t item) {
    const int64_t blocks = (p.pages.max_pages + kScoreBlock - 1) / kScoreBlock;
    h = item % p.kv_heads;
    b = item / p.kv_heads / blocks;
    first = item / p.kv_heads % blocks * kScoreBlock;
    last = first + kScoreBlock < p.pages.max_pages ? first + kScoreBlock : p.pages.max_pages;
    const int64_t pages = (p.seq_lens[b] + p.page_size - 1) / p.page_size;
    filled = pages < first ? first : pages < last ? pages : last;
    count = 0;
    for (int64_t page = first; page < filled; ++page) {
      const int64_t physical = p.pages.at(b, h, page);
      if (physical < 0) continue;  // not mapped
      rows[count] =
          static_cast<const T*>(p.summary.data) + physical * p.summary.stride_page + h * p.summary.stride_head;
      where[count++] = static_cast<int32_t>(page);
    }
  }
};

// `next` is the block after this one, whose rows are fetched meanwhile.
template <class T, class Q>
void score_block(const ScorePagesParams& p, const BlockRows<T>& block, const BlockRows<T>& next) {
  float* const scores = p.scores + (block.b * p.kv_heads + block.h) * p.pages.max_pages;
  for (int64_t page = block.first; page < block.last; ++page) scores[page] = -INFINITY;
  float queries[Vec::kHeadTile * 2 * kMaxHeadDim], out[Vec::kHeadTile * kScoreBlock] = {}, best[kScoreBlock];
  for (float& score : best) score = -INFINITY;
  for (int64_t g = 0; g < p.group; g += Vec::kHeadTile) {
    const int64_t heads = p.group - g < Vec::kHeadTile ? p.group - g : Vec::kHeadTile;
    for (int64_t i = 0; i < heads; ++i) {
      const Q* q = static_cast<const Q*>(p.q) + block.b * p.q_stride_b + (block.h * p.group + g + i) * p.q_stride_h;
      float* query = queries + i * 2 * p.head_dim;
      for (int64_t d = 0; d < p.head_dim; d += Vec::N) {
        const Vec x = Vec::load(q + d) * Vec::set1(p.scale);
        Vec::min(x, Vec::zero()).store(query + d);
        Vec::max(x, Vec::zero()).store(query + p.head_dim + d);
      }
    }
    dots(block.rows, block.count, queries, heads, 2 * p.head_dim, out, kScoreBlock,
         Ahead<T>{next.rows, g == 0 ? next.count : 0});
    for (int64_t i = 0; i < heads; ++i) {
      for (int64_t t = 0; t < kScoreBlock; t += Vec::N) {
        Vec::max(Vec::load(best + t), Vec::load(out + i * kScoreBlock + t)).store(best + t);
      }
    }
  }
  for (int64_t t = 0; t < block.count; ++t) scores[block.where[t]] = best[t];
}

}  // namespace

void score_pages(const ScorePagesParams& p, int64_t begin, int64_t end) {
  with_dtype(p.summary_dtype, [&]<class T>(const T*) {
    with_dtype(p.q_dtype, [&]<class Q>(const Q*) {
      BlockRows<T> blocks[2];
      blocks[begin % 2].gather(p, begin);
      for (int64_t i = begin; i < end; ++i) {
        BlockRows<T>&now = blocks[i % 2], &next = blocks[(i + 1) % 2];
        next.count = 0;
        if (i + 1 < end) next.gather(p, i + 1);
        score_block<T, Q>(p, now, next);
      }
    });
  });
}

}  // namespace lil::cpu::LIL_ISA

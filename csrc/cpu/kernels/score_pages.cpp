// minmax: no key of a page has a larger q . k than sum_d max(q_d * min_d, q_d * max_d). That is one dot product of
// [min(q, 0), max(q, 0)] with the page's [min, max].
// meanstd: were the keys' elements normal and independent, the mean of exp(q . k) over them would be
// exp(q . mean + 1/2 sum_d q_d^2 std_d^2). Those are two dot products, one with squares.
// representative: the mean of q . k over a group's heads and a page's r keys is one dot product of the page's row, its
// keys one after another, with the heads' mean query, r times over.
#include "cpu/kernels/dot.h"
#include "cpu/kernels/table.h"

namespace lil::cpu::LIL_ISA {
namespace {

constexpr int64_t kMaxHeadDim = 256;

// The summaries of one block of pages of one (sequence, KV head): those that exist and are mapped.
template <class T>
struct BlockRows {
  const T *rows[kScoreBlock], *stds[kScoreBlock];  // stds: in mode meanstd
  float k_scale[kScoreBlock] = {};
  int32_t where[kScoreBlock];                // their pages
  int64_t count, b, h, first, filled, last;  // pages [first, last) of the table, of which those up to `filled` exist

  BlockRows() {}  // the other arrays stay as they are until gather

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
      if (p.summary.mode == SummaryMode::kMeanStd) stds[count] = rows[count] + p.head_dim;
      k_scale[count] = p.k_scale.at(physical, h);
      where[count++] = static_cast<int32_t>(page);
    }
  }
};

// Scores for `heads` scaled queries, [heads, kScoreBlock], but for the last factor, k_scale. `next` is the block whose
// rows are fetched meanwhile, the first `fetched` of them.
template <class T>
void score_minmax(const float* queries, int64_t heads, int64_t head_dim, const BlockRows<T>& block,
                  const BlockRows<T>& next, int64_t fetched, float* out) {
  float bounds[Vec::kHeadTile * 2 * kMaxHeadDim];
  for (int64_t i = 0; i < heads; ++i) {
    float* const bound = bounds + i * 2 * head_dim;
    for (int64_t d = 0; d < head_dim; d += Vec::N) {
      const Vec x = Vec::load(queries + i * head_dim + d);
      Vec::min(x, Vec::zero()).store(bound + d);
      Vec::max(x, Vec::zero()).store(bound + head_dim + d);
    }
  }
  dots(block.rows, block.count, bounds, heads, 2 * head_dim, out, kScoreBlock, Ahead<T>{next.rows, fetched});
}

template <class T>
void score_meanstd(const float* queries, int64_t heads, int64_t head_dim, const BlockRows<T>& block,
                   const BlockRows<T>& next, int64_t fetched, float* out) {
  float squares[Vec::kHeadTile * kMaxHeadDim], variances[Vec::kHeadTile * kScoreBlock] = {};
  for (int64_t d = 0; d < heads * head_dim; d += Vec::N) {
    const Vec x = Vec::load(queries + d);
    (x * x).store(squares + d);
  }
  dots(block.rows, block.count, queries, heads, head_dim, out, kScoreBlock, Ahead<T>{next.rows, fetched});
  dots<true>(block.stds, block.count, squares, heads, head_dim, variances, kScoreBlock, Ahead<T>{next.stds, fetched});
  for (int64_t i = 0; i < heads * kScoreBlock; i += Vec::N) {
    const Vec half_scale = Vec::load(block.k_scale + i % kScoreBlock) * Vec::set1(0.5f);
    Vec::fma(half_scale, Vec::load(variances + i), Vec::load(out + i)).store(out + i);
  }
}

template <class T>
void score_representatives(const ScorePagesParams& p, const BlockRows<T>& block, const BlockRows<T>& next,
                           float* scores) {
  const int64_t length = p.summary.vectors * p.head_dim;
  const float unit = p.scale / static_cast<float>(p.group * p.summary.vectors);
  float query[kMaxRepresentatives * kMaxHeadDim], head[kMaxHeadDim], out[kScoreBlock];
  for (int64_t d = 0; d < p.head_dim; d += Vec::N) Vec::zero().store(query + d);
  for (int64_t g = 0; g < p.group; ++g) {
    load_queries(p.q, p.q_dtype, block.b * p.q_stride_b + (block.h * p.group + g) * p.q_stride_h, p.q_stride_h, 1,
                 p.head_dim, unit, head);
    for (int64_t d = 0; d < p.head_dim; d += Vec::N) (Vec::load(query + d) + Vec::load(head + d)).store(query + d);
  }
  for (int64_t d = p.head_dim; d < length; d += Vec::N) Vec::load(query + d - p.head_dim).store(query + d);
  dots(block.rows, block.count, query, 1, length, out, kScoreBlock, Ahead<T>{next.rows, next.count});
  for (int64_t t = 0; t < block.count; ++t) scores[block.where[t]] = out[t] * block.k_scale[t];
}

template <class T>
void score_block(const ScorePagesParams& p, const BlockRows<T>& block, const BlockRows<T>& next) {
  float* const scores = p.scores + (block.b * p.kv_heads + block.h) * p.pages.max_pages;
  for (int64_t page = block.first; page < block.last; ++page) scores[page] = -INFINITY;
  if (p.summary.mode == SummaryMode::kRepresentative) return score_representatives(p, block, next, scores);
  const auto score = p.summary.mode == SummaryMode::kMeanStd ? score_meanstd<T> : score_minmax<T>;
  float queries[Vec::kHeadTile * kMaxHeadDim], out[Vec::kHeadTile * kScoreBlock] = {}, best[kScoreBlock];
  for (float& x : best) x = -INFINITY;
  for (int64_t g = 0; g < p.group; g += Vec::kHeadTile) {
    const int64_t heads = p.group - g < Vec::kHeadTile ? p.group - g : Vec::kHeadTile;
    load_queries(p.q, p.q_dtype, block.b * p.q_stride_b + (block.h * p.group + g) * p.q_stride_h, p.q_stride_h, heads,
                 p.head_dim, p.scale, queries);
    score(queries, heads, p.head_dim, block, next, g == 0 ? next.count : 0, out);
    for (int64_t i = 0; i < heads; ++i) {
      for (int64_t t = 0; t < kScoreBlock; t += Vec::N) {
        const Vec scaled = Vec::load(out + i * kScoreBlock + t) * Vec::load(block.k_scale + t);
        Vec::max(Vec::load(best + t), scaled).store(best + t);
      }
    }
  }
  for (int64_t t = 0; t < block.count; ++t) scores[block.where[t]] = best[t];
}

}  // namespace

void score_pages(const ScorePagesParams& p, int64_t begin, int64_t end) {
  with_stored_dtype(p.summary.dtype, [&]<class T>(const T*) {
    BlockRows<T> blocks[2];
    blocks[begin % 2].gather(p, begin);
    for (int64_t i = begin; i < end; ++i) {
      BlockRows<T>&now = blocks[i % 2], &next = blocks[(i + 1) % 2];
      next.count = 0;
      if (i + 1 < end) next.gather(p, i + 1);
      score_block(p, now, next);
    }
  });
}

}  // namespace lil::cpu::LIL_ISA

// Cosines of a block of keys with all keys of the head, a tile at a time. The block is normalised once, as queries of
// `dots`; a tile's norms are found while it is at hand.
#include "key_redundancy.h"

#include "cpu/kernels/dot.h"
#include "cpu/kernels/table.h"

namespace lil::cpu::LIL_ISA {
namespace {

template <class T>
float inverse_norm(const T* key, int64_t head_dim) {
  Vec squares = Vec::zero();
  for (int64_t d = 0; d < head_dim; d += Vec::N) {
    const Vec x = Vec::load(key + d);
    squares = Vec::fma(x, x, squares);
  }
  return 1 / (sqrtf(squares.sum()) + kNormFloor);
}

struct Row {
  float sum;
  int32_t rank;
  Dropped dropped;
};

// Adds a tile's entries, in the order of the slots, from dot products that become cosines; the row's own is 0.
void add(Row& row, float* tile, const float* norms, const int32_t* positions, int64_t first, int64_t count, int64_t own,
         float threshold) {
  for (int64_t j = 0; j < count; ++j) tile[j] *= norms[j];
  for (int64_t j = count; j < kRedundancyKeys; ++j) tile[j] = 0;
  if (own >= first && own < first + count) tile[own - first] = 0;
  Vec sum = Vec::zero();
  for (int64_t j = 0; j < kRedundancyKeys; j += Vec::N) sum = sum + Vec::load(tile + j);
  row.sum += sum.sum();
  // First the highest rank, which is a loop without branches; then, where it wins, whose it is.
  int32_t highest = INT32_MIN;
  for (int64_t j = 0; j < count; ++j) {
    const int32_t rank = redundancy_rank(tile[j], threshold, positions[j]);
    highest = rank > highest ? rank : highest;
  }
  if (highest < row.rank) return;
  int64_t j = count - 1;
  while (redundancy_rank(tile[j], threshold, positions[j]) != highest) --j;
  row.rank = highest;
  row.dropped = {static_cast<int32_t>(first + j), tile[j]};
}

template <class T>
void block(const KeyRedundancyParams& p, int64_t b, int64_t h, int64_t first, Dropped* dropped, float* scratch) {
  const int64_t head_dim = p.cache.head_dim, page_size = p.cache.page_size, length = p.seq_lens[b];
  const int64_t count = length - first < kRedundancyRows ? length - first : kRedundancyRows;
  const auto key = [&](int64_t slot) {
    const PagedBuffer& k = p.cache.k;
    const int64_t physical = p.table.at(b, h, slot / page_size);
    return static_cast<const T*>(k.data) + physical * k.stride_page + h * k.stride_head +
           slot % page_size * k.stride_token;
  };
  float *const rows = scratch, *const tile = scratch + kRedundancyRows * head_dim;
  Row found[kRedundancyRows];
  for (int64_t i = 0; i < count; ++i) {
    found[i] = {0, INT32_MIN, {}};
    const Vec scale = Vec::set1(inverse_norm(key(first + i), head_dim));
    for (int64_t d = 0; d < head_dim; d += Vec::N) {
      (Vec::load(key(first + i) + d) * scale).store(rows + i * head_dim + d);
    }
  }
  for (int64_t start = 0; start < length; start += kRedundancyKeys) {
    const T* keys[kRedundancyKeys];
    float norms[kRedundancyKeys];
    int32_t positions[kRedundancyKeys];
    const int64_t here = length - start < kRedundancyKeys ? length - start : kRedundancyKeys;
    for (int64_t j = 0; j < here; ++j) {
      keys[j] = key(start + j);
      norms[j] = inverse_norm(keys[j], head_dim);
      positions[j] = p.position(b, h, start + j);
    }
    dots(keys, here, rows, count, head_dim, tile, kRedundancyKeys, Ahead<T>{keys, 0});
    for (int64_t i = 0; i < count; ++i) {
      add(found[i], tile + i * kRedundancyKeys, norms, positions, start, here, first + i, p.threshold);
    }
  }
  const int64_t at = (b * p.cache.kv_heads + h) * p.slots + first;
  for (int64_t i = 0; i < count; ++i) {
    p.redundancy[at + i] = found[i].sum;
    dropped[at + i] = found[i].dropped;
  }
}

}  // namespace

void redundancy_rows(const KeyRedundancyParams& p, Dropped* dropped, float* scratch, int64_t begin, int64_t end) {
  const int64_t blocks = (p.slots + kRedundancyRows - 1) / kRedundancyRows;
  with_stored_dtype(p.cache.dtype, [&]<class T>(const T*) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t head = i / blocks, b = head / p.cache.kv_heads, first = i % blocks * kRedundancyRows;
      if (first < p.seq_lens[b]) block<T>(p, b, head % p.cache.kv_heads, first, dropped, scratch);
    }
  });
}

}  // namespace lil::cpu::LIL_ISA

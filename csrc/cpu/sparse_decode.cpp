#include <algorithm>
#include <vector>

#include "cpu/backend.h"
#include "cpu/kernels/kernels.h"
#include "cpu/values.h"

namespace lil::cpu {
namespace {

// The page list's length for (b, h), its entries checked.
int64_t checked_entries(const SparseDecodeParams& p, int64_t b, int64_t h) {
  const char* op = "sparse_decode";
  const int64_t pages = pages_of(p.seq_lens[b], p.cache.page_size);
  if (!p.selected) {
    if (h < table_heads(p.table, p.cache.kv_heads)) {
      for (int64_t page = 0; page < pages; ++page) check_read_page(op, p.table, b, h, page, p.cache.num_pages);
    }
    return pages;
  }
  const int64_t count = checked_count(op, p.counts, p.capacity, b, h, p.cache.kv_heads);
  const int32_t* list = p.pages + b * p.pages_stride_b + h * p.pages_stride_h;
  for (int64_t i = 0; i < count; ++i) {
    check_listed_page(op, list[i], pages, b, h);
    if (list[i] != -1) check_read_page(op, p.table, b, h, list[i], p.cache.num_pages);
  }
  return count;
}

}  // namespace

void sparse_decode(const SparseDecodeParams& p, const Tensor&) {
  const int64_t heads = p.cache.kv_heads, chunk = kChunkTokens / p.cache.page_size;
  check_seq_lens("sparse_decode", p.seq_lens, p.batch, p.table.max_pages * p.cache.page_size);
  // Scratch that grows to the largest call and stays: the hot path allocates nothing.
  thread_local std::vector<AttendItem> items;
  thread_local std::vector<int64_t> first_item;
  thread_local std::vector<float> scratch;
  items.clear();
  first_item.assign(1, 0);
  for (int64_t b = 0; b < p.batch; ++b) {
    for (int64_t h = 0; h < heads; ++h) {
      const int64_t entries = checked_entries(p, b, h);
      for (int64_t first = 0; first < entries; first += chunk) {
        items.push_back({static_cast<int32_t>(b), static_cast<int32_t>(h), static_cast<int32_t>(first),
                         static_cast<int32_t>(std::min(first + chunk, entries)),
                         static_cast<int64_t>(items.size()) * p.group});
      }
      first_item.push_back(static_cast<int64_t>(items.size()));
    }
  }
  const int64_t rows = static_cast<int64_t>(items.size()) * p.group;
  scratch.resize(rows * (p.cache.head_dim + 2));
  const Partials partials{scratch.data(), scratch.data() + rows * p.cache.head_dim,
                          scratch.data() + rows * (p.cache.head_dim + 1)};
  const AttendItem* list = items.data();
  const int64_t* first = first_item.data();
  const Kernels& isa = kernels();
  torch::stable::parallel_for(0, static_cast<int64_t>(items.size()), 1,
                              [&](int64_t begin, int64_t end) { isa.attend_chunks(p, list, partials, begin, end); });
  // A head's partial results are a few kilobytes; its masses are as many numbers as it has tokens.
  const int64_t grain = p.page_mass || p.token_mass ? 1 : 16;
  torch::stable::parallel_for(0, p.batch * heads, grain, [&](int64_t begin, int64_t end) {
    isa.combine_chunks(p, list, first, partials, begin, end);
  });
}

}  // namespace lil::cpu

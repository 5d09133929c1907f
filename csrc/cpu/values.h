// What only the data shows. On the CPU it is the host's to see, so it is checked before anything is written.
#pragma once

#include "api/checks.h"

namespace lil::cpu {

inline void check_seq_lens(const char* op, const int32_t* seq_lens, int64_t batch, int64_t max_tokens) {
  for (int64_t b = 0; b < batch; ++b) {
    LIL_CHECK(seq_lens[b] >= 0 && seq_lens[b] <= max_tokens, op, "seq_lens",
              text(lengths_text(max_tokens), " for sequence ", b), text(seq_lens[b]));
  }
}

inline void check_physical_page(const char* op, const PageTable& table, int64_t b, int64_t h, int64_t page,
                                int64_t num_pages) {
  const int32_t physical = table.at(b, h, page);
  LIL_CHECK(physical >= 0 && physical < num_pages, op, "page_table",
            text("a page from 0 to ", num_pages - 1, " for page ", page, " of sequence ", b, ", KV head ", h),
            text(physical));
}

// For readers, who skip a page that is not mapped (-1).
inline void check_read_page(const char* op, const PageTable& table, int64_t b, int64_t h, int64_t page,
                            int64_t num_pages) {
  if (table.at(b, h, page) != -1) check_physical_page(op, table, b, h, page, num_pages);
}

// The entries of (b, h)'s page list that count.
inline int64_t checked_count(const char* op, const int32_t* counts, int64_t capacity, int64_t b, int64_t h,
                             int64_t kv_heads) {
  const int64_t count = counts ? counts[b * kv_heads + h] : capacity;
  LIL_CHECK(count >= 0 && count <= capacity, op, "counts",
            text("0 to ", capacity, " pages for sequence ", b, ", KV head ", h), text(count));
  return count;
}

// An entry of a page list, of a sequence of that many pages.
inline void check_listed_page(const char* op, int32_t page, int64_t pages, int64_t b, int64_t h) {
  LIL_CHECK(page >= -1 && page < pages, op, "pages",
            text("-1 or a page from 0 to ", pages - 1, " for sequence ", b, ", KV head ", h), text(page));
}

inline int64_t pages_of(int64_t tokens, int64_t page_size) { return (tokens + page_size - 1) / page_size; }

// KV heads whose tables have to be looked at: one where they share it.
inline int64_t table_heads(const PageTable& table, int64_t kv_heads) { return table.stride_h == 0 ? 1 : kv_heads; }

}  // namespace lil::cpu

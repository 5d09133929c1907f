// The rule of evict_pages for one head.
#pragma once

#include "params.h"

namespace lil {

// Whether slot a's page goes before slot b's: the lower priority, NaN last, and among equals the earlier page.
inline bool goes_before(float a, int32_t page_a, float b, int32_t page_b) {
  if (a == b || (a != a && b != b)) return page_a < page_b;
  return b != b || a < b;
}

// The slot that the page of the newest token takes; -1 where the head holds that page, or has no token. Lengths and
// held pages are in range.
inline int32_t evict_page_of(const EvictPagesParams& p, int64_t b, int64_t h) {
  const int64_t length = p.seq_lens[b];
  if (length == 0) return -1;
  int32_t* const held = p.held + (b * p.kv_heads + h) * p.capacity;
  const float* const priority = p.priority + (b * p.kv_heads + h) * p.capacity;
  int32_t* const table = p.page_table + b * p.table_stride_b + h * p.table_stride_h;
  const int32_t opened = static_cast<int32_t>((length - 1) / p.page_size);
  const int64_t recent = length > p.recent ? (length - p.recent) / p.page_size : 0;  // the first recent page
  const int64_t protect = p.protected_lens && p.protected_lens[b] > p.sink ? p.protected_lens[b] : p.sink;
  const int64_t head = (protect + p.page_size - 1) / p.page_size;
  // The best slot so far: free, else of a page that may go, else of the last page that is protected but not recent.
  int32_t free = -1, goes = -1, last = -1;
  for (int32_t s = 0; s < p.capacity; ++s) {
    if (held[s] == opened) return -1;
    if (held[s] < 0) {
      if (free < 0) free = s;
    } else if (held[s] < recent) {
      if (last < 0 || held[s] > held[last]) last = s;
      if (held[s] >= head && (goes < 0 || goes_before(priority[s], held[s], priority[goes], held[goes]))) goes = s;
    }
  }
  const int32_t slot = free >= 0 ? free : goes >= 0 ? goes : last;
  if (slot < 0) return -1;  // all are recent: only a list with duplicates can be so
  if (held[slot] >= 0) table[held[slot]] = -1;
  held[slot] = opened;
  table[opened] = p.slot_pages[b * p.capacity + slot];
  return slot;
}

}  // namespace lil

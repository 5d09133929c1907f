// The rule of evict_pages for one head, the same code on every backend.
#pragma once

#include <bit>

#include "host_device.h"
#include "params.h"

namespace lil {

// Says which of a head's slots the page of the newest token takes: that with the least key, and of equals the first.
class Eviction {
 public:
  // Keys of slots that no page may take: one that holds the newest page already, and a recent one.
  static constexpr uint64_t kHeld = 0, kRecent = ~uint64_t{0};

  // Of a sequence whose length is in range. Without tokens the newest page is -1, which free slots hold.
  LIL_HOST_DEVICE Eviction(const EvictPagesParams& p, int64_t b, int32_t length) {
    const int32_t sink = static_cast<int32_t>(p.sink), recent = static_cast<int32_t>(p.recent);
    const int32_t protect = p.protected_lens && p.protected_lens[b] > sink ? p.protected_lens[b] : sink;
    newest_ = last_page(length, p.page_shift);
    first_recent_ = length > recent ? (length - recent) >> p.page_shift : 0;
    protected_pages_ = last_page(protect, p.page_shift) + 1;
  }

  LIL_HOST_DEVICE int32_t newest() const { return newest_; }

  // Free slots come first, then pages by their priority, then protected ones, of which the last goes first.
  LIL_HOST_DEVICE uint64_t key(int32_t page, float priority) const {
    const bool kept = page < protected_pages_;
    uint64_t key = join(kept ? kProtected : rank(priority), kept ? ~page : page);
    if (page >= first_recent_) key = kRecent;
    if (page < 0) key = join(kFree, 0);
    return page == newest_ ? kHeld : key;
  }

  // Puts the newest page into the slot with the least key; returns the slot, or -1 where nothing was to do. (All are
  // recent only in a list with duplicates.)
  LIL_HOST_DEVICE int32_t fill(const EvictPagesParams& p, int64_t b, int64_t h, int32_t slot, uint64_t key) const {
    if (key == kHeld || key == kRecent) return -1;
    int32_t& held = p.held[(b * p.kv_heads + h) * p.capacity + slot];
    if (p.page_table) {
      int32_t* const table = p.page_table + b * p.table_stride_b + h * p.table_stride_h;
      if (held >= 0) table[held] = -1;
      table[newest_] = p.slot_pages[b * p.capacity + slot];
    }
    held = newest_;
    return slot;
  }

 private:
  // Ranks that no number has.
  static constexpr uint32_t kFree = 1, kNan = ~0u - 2, kProtected = ~0u - 1;

  int32_t newest_, first_recent_, protected_pages_;

  // Of the first so many tokens; -1 where there are none.
  LIL_HOST_DEVICE static int32_t last_page(int32_t tokens, int32_t shift) { return (tokens - 1) >> shift; }

  LIL_HOST_DEVICE static uint64_t join(uint32_t rank, uint32_t then) { return uint64_t{rank} << 32 | then; }

  // In the order of the numbers; -0 equals 0, NaN comes last.
  LIL_HOST_DEVICE static uint32_t rank(float priority) {
    const uint32_t bits = std::bit_cast<uint32_t>(priority + 0.0f), sign = bits >> 31;
    return priority != priority ? kNan : bits ^ (-sign | 1u << 31);
  }
};

}  // namespace lil

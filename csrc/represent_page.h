// The rule of represent_page for one head, the same code on every backend.
#pragma once

#include "host_device.h"
#include "params.h"

namespace lil {

// The first token inside the local window of the query at the end of `length` tokens.
LIL_HOST_DEVICE inline int64_t first_inside(const RepresentPageParams& p, int64_t length) {
  return length > p.recent ? length - p.recent : 0;
}

// The page whose last token the next query's window leaves out, and this one's does not; -1: none.
LIL_HOST_DEVICE inline int64_t leaving_page(const RepresentPageParams& p, int64_t length) {
  const int64_t outside = length + 1 - p.recent;
  return outside > 0 && outside % p.cache.page_size == 0 ? outside / p.cache.page_size - 1 : -1;
}

// Whether token i, of weight a, comes before token j, of weight b: NaN first, then the heavier, of equals the earlier.
LIL_HOST_DEVICE inline bool comes_before(float a, int64_t i, float b, int64_t j) {
  const bool a_nan = a != a, b_nan = b != b;
  if (a_nan != b_nan) return a_nan;
  return a_nan || a == b ? i < j : a > b;
}

}  // namespace lil

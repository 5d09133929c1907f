// Looking up sequences and pages. What is out of range is reported and skipped, so no address is ever made from it.
#pragma once

#include "cuda/errors.cuh"
#include "params.h"

namespace lil::cuda {

__device__ inline int32_t ceil_div(int32_t a, int32_t b) { return (a + b - 1) / b; }

// The sequence's length; 0 where it is out of range.
__device__ inline int32_t checked_length(Op op, const int32_t* seq_lens, int32_t b, int64_t max_tokens,
                                         ErrorWord* errors) {
  const int32_t length = seq_lens[b];
  if (length >= 0 && length <= max_tokens) return length;
  report(errors, op, Wrong::kSeqLens, b, length, max_tokens);
  return 0;
}

// The physical page; -1 where it is not mapped (an error only for who would write there) or out of range.
__device__ inline int32_t checked_page(Op op, const PageTable& table, int32_t b, int32_t h, int32_t page,
                                       int64_t num_pages, ErrorWord* errors) {
  const int32_t physical = table.at(b, h, page);
  if (physical >= 0 && physical < num_pages) return physical;
  if (physical != -1 || op == Op::kAppendKv) {
    report(errors, op, Wrong::kPageTable, b, physical, num_pages - 1);
  }
  return -1;
}

}  // namespace lil::cuda

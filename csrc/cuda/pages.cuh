// Looking up sequences and pages. What is out of range is noted and skipped, so no address is ever made from it. A
// thread keeps its first finding in registers and reports it once, at its end: the hot path stays short.
#pragma once

#include <cuda_runtime.h>

#include "cuda/errors.cuh"
#include "params.h"

namespace lil::cuda {

__device__ inline int32_t ceil_div(int32_t a, int32_t b) { return (a + b - 1) / b; }

struct Finding {
  Wrong wrong = Wrong::kNothing;
  int32_t got = 0, limit = 0;

  __device__ void note(bool bad, Wrong what, int32_t value, int64_t most) {
    if (!bad || wrong != Wrong::kNothing) return;
    wrong = what;
    got = value;
    limit = static_cast<int32_t>(most);
  }

  __device__ void report(ErrorWord* errors, Op op, int32_t sequence) const {
    if (wrong != Wrong::kNothing) cuda::report(errors, op, wrong, sequence, got, limit);
  }
};

// Page sizes are powers of two: pages and slots come by shifts.
struct PageSize {
  int32_t shift;

  __device__ explicit PageSize(int64_t page_size) { shift = 31 - __clz(static_cast<int32_t>(page_size)); }
  __device__ int32_t page(int32_t token) const { return token >> shift; }
  __device__ int32_t slot(int32_t token) const { return token & ((1 << shift) - 1); }
  __device__ int32_t first(int32_t page) const { return page << shift; }
  __device__ int32_t pages(int32_t tokens) const { return (tokens + (1 << shift) - 1) >> shift; }
};

// The sequence's length; 0 where it is out of range.
__device__ inline int32_t checked_length(Finding& finding, const int32_t* seq_lens, int32_t b, int64_t max_tokens) {
  const int32_t length = seq_lens[b];
  const bool bad = length < 0 || length > max_tokens;
  finding.note(bad, Wrong::kSeqLens, length, max_tokens);
  return bad ? 0 : length;
}

// The physical page that an entry of the page table names; -1 where it is not mapped or out of range.
__device__ inline int32_t checked_entry(Finding& finding, int32_t physical, int64_t num_pages) {
  const bool bad = physical < -1 || physical >= num_pages;
  finding.note(bad, Wrong::kPageTable, physical, num_pages - 1);
  return bad ? -1 : physical;
}

__device__ inline int32_t checked_page(Finding& finding, const PageTable& table, int32_t b, int32_t h, int32_t page,
                                       int64_t num_pages) {
  return checked_entry(finding, table.at(b, h, page), num_pages);
}

}  // namespace lil::cuda

// The vectorised inner loops, compiled once an instruction set. A driver in csrc/cpu/ splits the work into items and
// calls a range of them from each thread. Plain pointers only: see CMakeLists.txt for why no template crosses over.
#pragma once

#include "params.h"

namespace lil::cpu {

// Tokens whose attention is computed in one piece. A chunk begins at a fixed place of the page list, so results depend
// neither on the number of threads nor on whether the list came from a selection or is the whole sequence.
constexpr int64_t kChunkTokens = 256;

// One chunk of one (sequence, KV head).
struct AttendItem {
  int32_t b, h;
  int32_t first, last;  // entries of the page list
  int64_t partial;      // index of the chunk's first query head in the partial results
};

// Partial results of a chunk, a row for each query head of the group: the unnormalised output, then maximum and sum.
struct Partials {
  float* acc;  // [rows, head_dim]
  float* max;  // [rows]
  float* sum;  // [rows]
};

// A page of one head that an append touches; values are already checked.
struct AppendItem {
  int32_t b, h, page;      // logical page
  int32_t begin, end;      // slots of the page that receive tokens
  int32_t tokens_in_page;  // valid slots after the append
  int64_t first_token;     // row of k and v that goes to `begin`
};

// The entry that a row of the matrix of cosines leaves out.
struct Dropped {
  int32_t slot;
  float cosine;
};

struct Kernels {
  const char* name;
  void (*append_kv)(const AppendKvParams&, const AppendItem*, int64_t begin, int64_t end);
  void (*score_pages)(const ScorePagesParams&, int64_t begin, int64_t end);    // over batch x kv_heads x page blocks
  void (*select_pages)(const SelectPagesParams&, int64_t begin, int64_t end);  // over batch x kv_heads
  void (*attend_chunks)(const SparseDecodeParams&, const AttendItem*, const Partials&, int64_t begin, int64_t end);
  // Over batch x kv_heads; `first_item` [batch x kv_heads + 1] says which chunks are whose.
  void (*combine_chunks)(const SparseDecodeParams&, const AttendItem*, const int64_t* first_item, const Partials&,
                         int64_t begin, int64_t end);
  // Over batch x kv_heads; `scratch` is the thread's own, max_pages + kLossPadding.
  void (*information_loss)(const InformationLossParams&, float* scratch, int64_t begin, int64_t end);
  void (*represent_page)(const RepresentPageParams&, int64_t begin, int64_t end);  // over batch x kv_heads
  // Over batch x kv_heads x blocks of kRedundancyRows slots. What each row drops goes to `dropped` [batch, kv_heads,
  // slots]; `scratch` is the thread's own, kRedundancyScratch.
  void (*redundancy_rows)(const KeyRedundancyParams&, Dropped* dropped, float* scratch, int64_t begin, int64_t end);
  // Of decode_linear: x as it is multiplied, in float32 [rows, in_features]; then, over blocks of kLinearOutputs
  // outputs, the products.
  void (*linear_input)(const DecodeLinearParams&, float* x);
  void (*linear_outputs)(const DecodeLinearParams&, const float* x, int64_t begin, int64_t end);
};

// Outputs that one item of linear_outputs covers, a multiple of every Vec::N.
constexpr int64_t kLinearOutputs = 16;

// Pages that one item of score_pages covers.
constexpr int64_t kScoreBlock = 64;

// Keys that one item of redundancy_rows covers, and those that it compares them with at a time; together they stay in
// L1 for the usual shapes.
constexpr int64_t kRedundancyRows = 32, kRedundancyKeys = 64;
constexpr int64_t kRedundancyScratch = kRedundancyRows * (256 + kRedundancyKeys);

// Up to a whole vector of any instruction set.
constexpr int64_t kLossPadding = 16;

// The best set that this processor runs; LIL_CPU_ISA=generic|avx2|avx512 in the environment asks for a lesser one, and
// any other value throws.
const Kernels& kernels();

}  // namespace lil::cpu

// What the kernels are given: plain structs of pointers, strides (in elements) and sizes. No tensors, no torch headers.
#pragma once

#include <cstdint>

namespace lil {

enum class DType : int32_t { kFloat32, kFloat16, kBFloat16, kFloat8E4M3 };

// What the vectors of a page summary are: two, or some of the page's keys.
enum class SummaryMode : int32_t { kMinMax, kMeanStd, kRepresentative };
constexpr int64_t kMaxRepresentatives = 16;

// Logical page of a sequence -> physical page of the cache. stride_h is 0 where all KV heads share one table.
struct PageTable {
  const int32_t* data;
  int64_t stride_b, stride_h;
  int64_t max_pages;

  constexpr int64_t index(int64_t b, int64_t h, int64_t page) const { return b * stride_b + h * stride_h + page; }
  constexpr int32_t at(int64_t b, int64_t h, int64_t page) const { return data[index(b, h, page)]; }
};

// One of the two cache buffers, [num_pages, kv_heads, page_size, head_dim], last dimension contiguous.
struct PagedBuffer {
  void* data;
  int64_t stride_page, stride_head, stride_token;
};

// What stored float8 values are multiplied by, one factor a KV head (stride_page 0) or a (page, KV head).
struct Scale {
  const float* data;  // null: 1
  int64_t stride_page;

  constexpr float at(int64_t physical, int64_t h) const { return data ? data[physical * stride_page + h] : 1.0f; }
};

struct KvCache {
  PagedBuffer k, v;
  int64_t num_pages, kv_heads, page_size, head_dim;
  DType dtype;
  Scale k_scale, v_scale;
};

// Page summaries, [num_pages, kv_heads, vectors, head_dim]; the last two dimensions are contiguous. data is null where
// the caller keeps none. Summaries of float8 keys are of the stored values, before the scale; those of wider keys may
// be float8 too.
struct Summary {
  void* data;
  int64_t stride_page, stride_head, vectors;
  SummaryMode mode;
  DType dtype;
};

struct AppendKvParams {
  KvCache cache;
  Summary summary;
  const void *k, *v;  // [tokens, kv_heads, head_dim]
  DType k_dtype;      // the cache's, or a wider one where the cache is float8
  int64_t k_stride_token, k_stride_head, v_stride_token, v_stride_head;
  PageTable pages;
  const int32_t* seq_lens;    // [batch], this append included
  const int32_t* cu_seqlens;  // [batch + 1], or null: one token a sequence
  int64_t batch, tokens;
  const int32_t* slots;  // [batch, kv_heads]: where each head's one new token goes, -1: the last place; or null
};

struct ScorePagesParams {
  const void* q;  // [batch, q_heads, head_dim]
  int64_t q_stride_b, q_stride_h;
  DType q_dtype;
  Summary summary;
  Scale k_scale;
  int64_t num_pages;
  PageTable pages;
  const int32_t* seq_lens;
  int64_t batch, kv_heads, group, head_dim, page_size;
  float scale;
  float* scores;  // [batch, kv_heads, max_pages], contiguous
};

struct SelectPagesParams {
  const float* scores;  // [batch, kv_heads, max_pages], last dimension contiguous
  int64_t stride_b, stride_h;
  const int32_t* seq_lens;
  const int32_t* protected_lens;  // [batch] or null
  int64_t batch, kv_heads, max_pages, page_size;
  int64_t budget_pages;  // pages a head may read; the outputs' last dimension is min(budget_pages, max_pages)
  int64_t sink, recent;
  int32_t* pages;   // [batch, kv_heads, capacity]
  int32_t* counts;  // [batch, kv_heads]
  int64_t capacity;
};

struct SparseDecodeParams {
  const void* q;  // [batch, kv_heads * group, head_dim]
  int64_t q_stride_b, q_stride_h;
  DType q_dtype;
  KvCache cache;
  PageTable table;
  const int32_t* seq_lens;
  bool selected;         // read the pages listed; otherwise every page of the sequence
  const int32_t* pages;  // [batch, kv_heads, capacity]; an empty list may be null
  int64_t pages_stride_b, pages_stride_h;
  const int32_t* counts;  // [batch, kv_heads], contiguous, or null: every entry of pages
  int64_t capacity;
  int64_t batch, group;
  float scale;
  int64_t window;  // tokens that may be read, counted from the end; 0: all
  float softcap;   // 0: none
  void* out;       // [batch, kv_heads * group, head_dim], contiguous, q's dtype
  float* lse;      // [batch, kv_heads * group], contiguous
  // Share of the softmax mass of each entry of the list, or of each of its tokens, or null; capacity is that of the
  // list, or max_pages where there is none.
  float* page_mass;   // [batch, kv_heads * group, capacity], contiguous
  float* token_mass;  // [batch, kv_heads * group, capacity * page_size], contiguous

  constexpr int64_t entries_capacity() const { return selected ? capacity : table.max_pages; }
};

struct InformationLossParams {
  const float* lse;     // [batch, kv_heads * group], contiguous
  const float* scores;  // [batch, kv_heads, max_pages], last dimension contiguous
  int64_t stride_b, stride_h;
  const int32_t* seq_lens;
  const int32_t* pages;  // [batch, kv_heads, capacity]; an empty list may be null
  int64_t pages_stride_b, pages_stride_h;
  const int32_t* counts;  // [batch, kv_heads], contiguous, or null: every entry of pages
  int64_t capacity;
  int64_t batch, kv_heads, group, max_pages, page_size;
  float softcap;  // 0: none
  float* loss;    // [batch, kv_heads * group], contiguous
};

// One decode step of a layer. The parts have the same q, cache, table and lengths. score.scores and select.scores are
// one scratch tensor.
struct SparseDecodeStepParams {
  AppendKvParams append;
  ScorePagesParams score;
  SelectPagesParams select;
  SparseDecodeParams attend;
  float* loss;  // [batch, kv_heads * group], contiguous, or null
};

// Heads hold a fixed number of pages of 1 << page_shift tokens. Where there is a table, slot s of a sequence is
// physical page slot_pages[b, s], for every head.
struct EvictPagesParams {
  int32_t* held;          // [batch, kv_heads, capacity]: the logical page in each slot, -1: free
  const float* priority;  // [batch, kv_heads, capacity]
  const int32_t* seq_lens;
  const int32_t* protected_lens;  // [batch] or null
  int32_t* page_table;            // [batch, kv_heads, max_pages], last dimension contiguous, or null
  int64_t table_stride_b, table_stride_h;
  const int32_t* slot_pages;  // [batch, capacity], or null
  int64_t batch, kv_heads, capacity, sink, recent;
  int64_t max_tokens;  // of a sequence
  int32_t page_shift;
  int32_t* slots;  // [batch, kv_heads]
};

enum class FoldRule : int32_t { kSum, kLast, kStamp };

// Heads hold a fixed number of pages of page_size tokens, or single tokens (1).
struct FoldMassParams {
  float* priority;      // [batch, kv_heads, capacity]
  const float* mass;    // [batch, q_heads, entries]
  const int32_t* held;  // [batch, kv_heads, capacity]: the logical page in each slot, -1: free
  const int32_t* seq_lens;
  int64_t batch, kv_heads, group, q_heads, capacity, entries, page_size;
  FoldRule rule;
  bool shared;   // the mass of all query heads
  double share;  // kStamp: of the slots that hold a page
};

// A step's mass is gathered in the weights of the tokens inside the local window, the last `recent` ones. The page that
// leaves it is represented by the mean of its heaviest keys.
struct RepresentPageParams {
  Summary summary;  // of one vector
  float* weight;    // [batch, kv_heads, max_pages * page_size], contiguous
  KvCache cache;    // its keys; v is k again
  PageTable table;
  const int32_t* seq_lens;
  const float* mass;     // [batch, kv_heads * group, capacity * page_size], contiguous
  const int32_t* pages;  // [batch, kv_heads, capacity]
  int64_t pages_stride_b, pages_stride_h;
  const int32_t* counts;  // [batch, kv_heads], contiguous, or null: every entry of pages
  int64_t capacity;
  int64_t batch, group, recent, representatives;
};

// Slot keep[b, h, i] of a head moves to slot i, for the first counts[b] entries.
struct CompactKvParams {
  KvCache cache;
  int64_t element_size;  // bytes
  PageTable table;
  const int32_t* keep;  // [batch, kv_heads, capacity], last dimension contiguous
  int64_t keep_stride_b, keep_stride_h;
  const int32_t* counts;  // [batch]
  int64_t batch, capacity;
};

struct KeyRedundancyParams {
  KvCache cache;  // its keys; v is k again
  PageTable table;
  const int32_t* seq_lens;
  const int32_t* positions;  // [batch, kv_heads, positions_capacity], last dimension contiguous, or null: the slots
  int64_t positions_stride_b, positions_stride_h, positions_capacity;
  int64_t batch, slots;  // slots: max_pages * page_size
  float threshold;
  float* redundancy;  // [batch, kv_heads, slots], contiguous

  constexpr int32_t position(int64_t b, int64_t h, int64_t slot) const {
    return positions ? positions[b * positions_stride_b + h * positions_stride_h + slot] : static_cast<int32_t>(slot);
  }
};

// A decode step's rows: one tile of tensor cores.
constexpr int64_t kMaxLinearRows = 8;

struct DecodeLinearParams {
  DType dtype;
  const void* x;          // [rows, in_features]
  const void* weight;     // [out_features, in_features]; gated: [2 * out_features, in_features], the gate's rows first
  const void* bias;       // [out_features], or null
  const void* norm;       // [in_features], or null
  const void* residual;   // [rows, out_features], or null
  const void *cos, *sin;  // [rows, head_dim], or null
  void* out;              // [rows, out_features]
  int64_t rows, in_features, out_features;
  int64_t rotated, head_dim;  // the first outputs are heads that are rotated, a multiple of 32 wide; 0, 1: none
  bool gated;
  float eps;
};

struct Lz77AppendParams {
  int32_t* state;  // [batch, state_size], contiguous
  int64_t state_size;
  const void* tokens;  // [batch, max_tokens]
  int64_t tokens_stride_b;
  bool tokens_int64;
  const int32_t* counts;  // [batch] or null: max_tokens each
  int64_t batch, max_tokens, vocab_size;
  int32_t* phrases;  // [batch]
  int32_t* bits;     // [batch]
};

struct GuardianCheckParams {
  const int32_t* sizes;       // [batch]
  const int32_t* num_tokens;  // [batch]
  const int32_t* interval;    // [batch]
  const float* threshold;     // [batch]
  int32_t* checkpoint;        // [batch, 2]: tokens and size at the last check
  int32_t* gain;              // [batch]
  int32_t* stop;              // [batch]
  int64_t batch;
};

// Codes of the stop tensor; lil_ops.StopReason mirrors them.
enum StopReason : int32_t { kRunning = 0, kStopEos = 1, kStopLength = 2, kStopGuardian = 3 };

}  // namespace lil

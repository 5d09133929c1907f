#pragma once

#include "api/checks.h"
#include "api/name.h"

namespace lil {

inline FoldRule check_fold_rule(const std::string& rule, const char* op) {
  if (rule == "sum") return FoldRule::kSum;
  if (rule == "last") return FoldRule::kLast;
  LIL_CHECK(rule == "stamp", op, "rule", "'sum', 'last' or 'stamp'", "'" + rule + "'");
  return FoldRule::kStamp;
}

template <class Backend>
void fold_mass(Tensor priority, const Tensor& mass, const Tensor& held, const Tensor& seq_lens, int64_t page_size,
               const Name& rule, bool shared, double share) {
  const char* op = "fold_mass";
  check_shape(priority, op, "priority", "[batch, kv_heads, capacity]", {-1, -1, -1});
  const int64_t batch = priority.size(0), kv_heads = priority.size(1), capacity = priority.size(2);
  check_dense(priority, priority, op, "priority", "[batch, kv_heads, capacity]", {batch, kv_heads, capacity},
              ScalarType::Float);
  check_shape(mass, op, "mass", "[batch, q_heads, entries]", {batch, -1, -1});
  check_dense(mass, priority, op, "mass", "[batch, q_heads, entries]", {batch, mass.size(1), mass.size(2)},
              ScalarType::Float);
  LIL_CHECK(kv_heads > 0 ? mass.size(1) % kv_heads == 0 : mass.size(1) == 0, op, "mass",
            text("query heads that are a multiple of ", kv_heads), text(mass.size(1)));
  check_dense(held, priority, op, "held", "[batch, kv_heads, capacity]", {batch, kv_heads, capacity});
  check_dense(seq_lens, priority, op, "seq_lens", "[batch]", {batch});
  if (page_size != 1) check_page_size(page_size, op, "page_size");
  LIL_CHECK(share > 0 && share <= 1, op, "share", "above 0 and up to 1", text(share));
  FoldMassParams params{};
  params.priority = static_cast<float*>(priority.mutable_data_ptr());
  params.mass = static_cast<const float*>(mass.const_data_ptr());
  params.held = int32_data(held);
  params.seq_lens = int32_data(seq_lens);
  params.batch = batch;
  params.kv_heads = kv_heads;
  params.capacity = capacity;
  params.q_heads = mass.size(1);
  params.entries = mass.size(2);
  params.page_size = page_size;
  params.group = kv_heads > 0 ? mass.size(1) / kv_heads : 0;
  params.shared = shared;
  params.rule = check_fold_rule(rule, op);
  params.share = share;
  if (batch > 0 && kv_heads > 0 && capacity > 0) Backend::fold_mass(params, priority);
}

}  // namespace lil

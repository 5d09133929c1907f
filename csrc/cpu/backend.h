// The CPU drivers: each checks the values that only the data shows (lengths, page ids, token ids), before anything is
// written, and spreads the work over torch's thread pool. The `on` tensor says which device; the CPU has one.
#pragma once

#include <torch/csrc/stable/ops.h>

#include "api/checks.h"
#include "params.h"

namespace lil::cpu {

void append_kv(const AppendKvParams&, const Tensor& on);
void score_pages(const ScorePagesParams&, const Tensor& on);
void select_pages(const SelectPagesParams&, const Tensor& on);
void sparse_decode(const SparseDecodeParams&, const Tensor& on);
void information_loss(const InformationLossParams&, const Tensor& on);
void sparse_decode_step(const SparseDecodeStepParams&, const Tensor& on);
void evict_pages(const EvictPagesParams&, const Tensor& on);
void fold_mass(const FoldMassParams&, const Tensor& on);
void represent_page(const RepresentPageParams&, const Tensor& on);
void compact_kv(const CompactKvParams&, const Tensor& on);
void key_redundancy(const KeyRedundancyParams&, const Tensor& on);
void decode_linear(const DecodeLinearParams&, const Tensor& on);
void lz77_append(const Lz77AppendParams&, const Tensor& on);
void guardian_check(const GuardianCheckParams&, const Tensor& on);

struct Backend {
  static constexpr int64_t kAlignment = 1;  // a vector may begin anywhere
  static constexpr auto append_kv = &cpu::append_kv;
  static constexpr auto score_pages = &cpu::score_pages;
  static constexpr auto select_pages = &cpu::select_pages;
  static constexpr auto sparse_decode = &cpu::sparse_decode;
  static constexpr auto information_loss = &cpu::information_loss;
  static constexpr auto sparse_decode_step = &cpu::sparse_decode_step;
  static constexpr auto evict_pages = &cpu::evict_pages;
  static constexpr auto fold_mass = &cpu::fold_mass;
  static constexpr auto represent_page = &cpu::represent_page;
  static constexpr auto compact_kv = &cpu::compact_kv;
  static constexpr auto key_redundancy = &cpu::key_redundancy;
  static constexpr auto decode_linear = &cpu::decode_linear;
  static constexpr auto lz77_append = &cpu::lz77_append;
  static constexpr auto guardian_check = &cpu::guardian_check;
};

}  // namespace lil::cpu

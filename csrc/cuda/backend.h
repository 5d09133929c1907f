// The CUDA launchers. The `on` tensor says which device; params are as in csrc/params.h, in device memory.
#pragma once

#include <torch/csrc/stable/ops.h>

#include "api/checks.h"
#include "params.h"

namespace lil::cuda {

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
  // Rows are read in vectors of this many bytes: every row must begin at a multiple of it.
  static constexpr int64_t kAlignment = 16;
  static constexpr auto append_kv = &cuda::append_kv;
  static constexpr auto score_pages = &cuda::score_pages;
  static constexpr auto select_pages = &cuda::select_pages;
  static constexpr auto sparse_decode = &cuda::sparse_decode;
  static constexpr auto information_loss = &cuda::information_loss;
  static constexpr auto sparse_decode_step = &cuda::sparse_decode_step;
  static constexpr auto evict_pages = &cuda::evict_pages;
  static constexpr auto fold_mass = &cuda::fold_mass;
  static constexpr auto represent_page = &cuda::represent_page;
  static constexpr auto compact_kv = &cuda::compact_kv;
  static constexpr auto key_redundancy = &cuda::key_redundancy;
  static constexpr auto decode_linear = &cuda::decode_linear;
  static constexpr auto lz77_append = &cuda::lz77_append;
  static constexpr auto guardian_check = &cuda::guardian_check;
};

}  // namespace lil::cuda

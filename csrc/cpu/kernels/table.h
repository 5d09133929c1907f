// This instruction set's kernels, gathered by table.cpp.
#pragma once

#include "cpu/kernels/kernels.h"

namespace lil::cpu::LIL_ISA {

void append_kv(const AppendKvParams&, const AppendItem*, int64_t begin, int64_t end);
void score_pages(const ScorePagesParams&, int64_t begin, int64_t end);
void select_pages(const SelectPagesParams&, int64_t begin, int64_t end);
void attend_chunks(const SparseDecodeParams&, const AttendItem*, const Partials&, int64_t begin, int64_t end);
void combine_chunks(const SparseDecodeParams&, const AttendItem*, const int64_t* first_item, const Partials&,
                    int64_t begin, int64_t end);
void information_loss(const InformationLossParams&, float* scratch, int64_t begin, int64_t end);
void represent_page(const RepresentPageParams&, int64_t begin, int64_t end);
void redundancy_rows(const KeyRedundancyParams&, Dropped* dropped, float* scratch, int64_t begin, int64_t end);
void linear_input(const DecodeLinearParams&, float* x);
void linear_outputs(const DecodeLinearParams&, const float* x, int64_t begin, int64_t end);

}  // namespace lil::cpu::LIL_ISA

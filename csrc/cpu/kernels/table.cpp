#include "cpu/kernels/table.h"

#define LIL_STRING_(x) #x
#define LIL_STRING(x) LIL_STRING_(x)

namespace lil::cpu::LIL_ISA {

extern const Kernels kKernels;
const Kernels kKernels{LIL_STRING(LIL_ISA), append_kv,      score_pages,      select_pages,
                       attend_chunks,       combine_chunks, information_loss, represent_page,
                       redundancy_rows,     linear_input,   linear_outputs};

}  // namespace lil::cpu::LIL_ISA

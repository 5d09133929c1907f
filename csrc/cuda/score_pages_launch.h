// What sparse_decode_step shares with score_pages.
#pragma once

#include "cuda/backend.h"

namespace lil::cuda {

// One launch that scores and, where append.k is not null, appends one token a sequence.
void append_and_score(const AppendKvParams& append, const ScorePagesParams&, const Tensor& on);

}  // namespace lil::cuda

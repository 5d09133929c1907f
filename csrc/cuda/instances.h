// sparse_decode on tensor cores is compiled for one element type and head_dim at a time, each in a file of its own
// (CMakeLists.txt makes the files from sparse_decode_mma.cu.in). `with_head_dim` picks the instance.
#pragma once

#include <cstdint>

#include "cuda/launch.cuh"
#include "params.h"

namespace lil::cuda {

// What an attention kernel that selects its pages itself is given besides; pages.scores is null where it does not.
struct Selecting {
  SelectPagesParams pages;
  float* loss;  // [batch, kv_heads * group], or null
};

template <class T, int D>
void launch_sparse_decode_mma(const SparseDecodeParams&, const Selecting&, const Launch&, const Tensor& on);

template <int D>
struct HeadDim {
  static constexpr int value = D;
};

// The host checks let no other value through.
template <class F>
void with_head_dim(int64_t head_dim, F f) {
  switch (head_dim) {
    case 64:
      return f(HeadDim<64>());
    case 80:
      return f(HeadDim<80>());
    case 96:
      return f(HeadDim<96>());
    case 128:
      return f(HeadDim<128>());
    case 192:
      return f(HeadDim<192>());
    case 256:
      return f(HeadDim<256>());
  }
}

}  // namespace lil::cuda

// The CUDA kernels' registration. An operator's host check is the one in api/, shared with the CPU.
#include <torch/csrc/stable/library.h>

#include "api/append_kv.h"
#include "api/compact_kv.h"
#include "api/decode_linear.h"
#include "api/evict_pages.h"
#include "api/fold_mass.h"
#include "api/guardian_check.h"
#include "api/information_loss.h"
#include "api/key_redundancy.h"
#include "api/lz77_append.h"
#include "api/represent_page.h"
#include "api/score_pages.h"
#include "api/select_pages.h"
#include "api/sparse_decode.h"
#include "api/sparse_decode_step.h"
#include "cuda/backend.h"

STABLE_TORCH_LIBRARY_IMPL(lil, CUDA, m) {
  using lil::cuda::Backend;
  m.impl("append_kv", TORCH_BOX(&lil::append_kv<Backend>));
  m.impl("score_pages", TORCH_BOX(&lil::score_pages<Backend>));
  m.impl("select_pages", TORCH_BOX(&lil::select_pages<Backend>));
  m.impl("sparse_decode", TORCH_BOX(&lil::sparse_decode<Backend>));
  m.impl("information_loss", TORCH_BOX(&lil::information_loss<Backend>));
  m.impl("sparse_decode_step", TORCH_BOX(&lil::sparse_decode_step<Backend>));
  m.impl("evict_pages", TORCH_BOX(&lil::evict_pages<Backend>));
  m.impl("fold_mass", TORCH_BOX(&lil::fold_mass<Backend>));
  m.impl("represent_page", TORCH_BOX(&lil::represent_page<Backend>));
  m.impl("compact_kv", TORCH_BOX(&lil::compact_kv<Backend>));
  m.impl("key_redundancy", TORCH_BOX(&lil::key_redundancy<Backend>));
  m.impl("decode_linear", TORCH_BOX(&lil::decode_linear<Backend>));
  m.impl("lz77_append", TORCH_BOX(&lil::lz77_append<Backend>));
  m.impl("guardian_check", TORCH_BOX(&lil::guardian_check<Backend>));
}

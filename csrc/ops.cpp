// Every operator's schema, in one place, and the CPU registrations. docs/design.md says why each is as it is;
// lil_ops/ops.py documents arguments and errors.
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
#include "cpu/backend.h"

STABLE_TORCH_LIBRARY(lil, m) {
  // Writes new tokens' K and V into the paged cache and renews the summaries of the pages they touch.
  m.def(
      "append_kv(Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor(c!)? summary, Tensor k, Tensor v, Tensor page_table, "
      "Tensor seq_lens, Tensor? cu_seqlens=None, *, str summary_mode=\"minmax\", Tensor? k_scale=None, "
      "Tensor? v_scale=None, Tensor? slots=None) -> ()");
  // How much attention each page may receive, one number a (sequence, KV head, page).
  m.def(
      "score_pages(Tensor q, Tensor summary, Tensor page_table, Tensor seq_lens, int page_size, *, float? scale=None, "
      "str summary_mode=\"minmax\", Tensor? k_scale=None) -> Tensor");
  // The pages each KV head reads: sink, protected and recent pages, then the best scored, within the budget.
  m.def(
      "select_pages(Tensor scores, Tensor seq_lens, int page_size, int budget, *, int sink=0, int recent=1, "
      "Tensor? protected_lens=None) -> (Tensor pages, Tensor counts)");
  // Attention of one query token a sequence over the selected pages, or over all of them.
  m.def(
      "sparse_decode(Tensor q, Tensor k_cache, Tensor v_cache, Tensor page_table, Tensor seq_lens, Tensor? pages=None, "
      "Tensor? counts=None, *, float? scale=None, int window=0, float softcap=0.0, Tensor? k_scale=None, "
      "Tensor? v_scale=None, Tensor(a!)? page_mass=None, Tensor(b!)? token_mass=None) -> (Tensor out, Tensor lse)");
  // Share of the softmax mass that was not read, from the lse of what was and the scores of what was not.
  m.def(
      "information_loss(Tensor lse, Tensor scores, Tensor seq_lens, int page_size, Tensor pages, Tensor? counts=None, "
      "*, float softcap=0.0) -> Tensor");
  // One decode step of a layer: append one token a sequence, score, select and attend, in as few launches as may be.
  m.def(
      "sparse_decode_step(Tensor q, Tensor k, Tensor v, Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor(c!) summary, "
      "Tensor page_table, Tensor seq_lens, int budget, *, int sink=0, int recent=1, Tensor? protected_lens=None, "
      "float? scale=None, float softcap=0.0, str summary_mode=\"minmax\", Tensor? k_scale=None, Tensor? v_scale=None, "
      "Tensor(d!)? loss=None) -> (Tensor out, Tensor lse)");
  // Makes room for the newest token, or its page, where heads hold a fixed number of them: the least of them goes.
  m.def(
      "evict_pages(Tensor(a!) held, Tensor priority, Tensor seq_lens, int page_size, *, int sink=0, int recent=1, "
      "Tensor? protected_lens=None, Tensor(b!)? page_table=None, Tensor? slot_pages=None) -> Tensor slots");
  // Makes of the softmax mass of what was read the priorities that evict_pages goes by.
  m.def(
      "fold_mass(Tensor(a!) priority, Tensor mass, Tensor held, Tensor seq_lens, int page_size, *, str rule=\"sum\", "
      "bool shared=False, float share=0.5) -> ()");
  // Gathers softmax mass inside the local window, and lets the heaviest keys of the page that leaves it stand for it.
  m.def(
      "represent_page(Tensor(a!) summary, Tensor(b!) weight, Tensor k_cache, Tensor page_table, "
      "Tensor seq_lens, Tensor mass, Tensor pages, Tensor? counts=None, *, int recent, int representatives) -> ()");
  // Moves the kept slots of each head to the front of its pages, in place.
  m.def("compact_kv(Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor page_table, Tensor keep, Tensor counts) -> ()");
  // How much like the others each cached key is: R-KV's redundancy, without a matrix of all pairs.
  m.def(
      "key_redundancy(Tensor k_cache, Tensor page_table, Tensor seq_lens, *, float threshold=0.5, "
      "Tensor? positions=None) -> Tensor");
  // A linear layer of a decode step, with the norm before it and the rotation, gate or addition behind it.
  m.def(
      "decode_linear(Tensor x, Tensor weight, Tensor? bias=None, *, Tensor? norm=None, float eps=1e-06, "
      "bool gated=False, Tensor? residual=None, Tensor? cos=None, Tensor? sin=None, int rotated=0) -> Tensor");
  // Feeds new tokens to each sequence's LZ77 parse; returns its size in phrases and in bits.
  m.def(
      "lz77_append(Tensor(a!) state, Tensor tokens, Tensor? counts, int vocab_size) -> (Tensor phrases, Tensor bits)");
  // Guardian's rule at interval ends: growth of the size below the threshold sets the sequence's stop code.
  m.def(
      "guardian_check(Tensor sizes, Tensor num_tokens, Tensor interval, Tensor threshold, Tensor(a!) checkpoint, "
      "Tensor(b!) gain, Tensor(c!) stop) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(lil, CPU, m) {
  using lil::cpu::Backend;
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

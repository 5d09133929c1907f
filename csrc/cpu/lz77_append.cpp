#include <algorithm>

#include "cpu/backend.h"
#include "lz77.h"

namespace lil::cpu {
namespace {

int64_t count_of(const Lz77AppendParams& p, int64_t b) { return p.counts ? p.counts[b] : p.max_tokens; }

lz77::Parse parse_of(const Lz77AppendParams& p, int64_t b) { return {p.state + b * p.state_size, p.state_size}; }

template <class Token>
const Token* tokens_of(const Lz77AppendParams& p, int64_t b) {
  return static_cast<const Token*>(p.tokens) + b * p.tokens_stride_b;
}

template <class Token>
void check_sequence(const Lz77AppendParams& p, int64_t b) {
  const char* op = "lz77_append";
  const lz77::Parse parse = parse_of(p, b);
  LIL_CHECK(parse.valid(), op, "state", "rows of lil_ops.lz77_state, which only lz77_append writes",
            text("something else in row ", b));
  const int64_t count = count_of(p, b);
  LIL_CHECK(count >= 0 && count <= p.max_tokens, op, "counts", text("0 to ", p.max_tokens, " tokens for sequence ", b),
            text(count));
  LIL_CHECK(parse.num_tokens() + count <= parse.capacity(), op, "state",
            text("room for ", parse.num_tokens() + count, " tokens of sequence ", b),
            text("a capacity of ", parse.capacity()));
  const Token* tokens = tokens_of<Token>(p, b);
  for (int64_t t = 0; t < count; ++t) {
    LIL_CHECK(tokens[t] >= 0 && tokens[t] < p.vocab_size, op, "tokens",
              text("0 to ", p.vocab_size - 1, " at token ", t, " of sequence ", b), text(tokens[t]));
  }
}

template <class Token>
void append_all(const Lz77AppendParams& p) {
  for (int64_t b = 0; b < p.batch; ++b) check_sequence<Token>(p, b);
  const int32_t token_bits = lz77::index_bits(p.vocab_size);
  const auto append = [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b) {
      lz77::Parse parse = parse_of(p, b);
      const Token* tokens = tokens_of<Token>(p, b);
      if (count_of(p, b) > 0 && parse.keeps(lz77::Kept::kOccurrences)) parse.grow_tree(token_bits);
      for (int64_t t = 0; t < count_of(p, b); ++t) parse.append(static_cast<int32_t>(tokens[t]), token_bits);
      p.phrases[b] = parse.phrases();
      p.bits[b] = parse.bits(token_bits);
    }
  };
  constexpr int64_t kGrainTokens = 256;  // a thread's share is worth its start
  const int64_t grain = std::max<int64_t>(1, kGrainTokens / std::max<int64_t>(1, p.max_tokens));
  p.batch <= grain ? append(0, p.batch) : torch::stable::parallel_for(0, p.batch, grain, append);
}

}  // namespace

void lz77_append(const Lz77AppendParams& p, const Tensor&) {
  p.tokens_int64 ? append_all<int64_t>(p) : append_all<int32_t>(p);
}

}  // namespace lil::cpu

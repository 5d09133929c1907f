// The state of a token sequence's incremental greedy LZ77 parse, one int32 array so that it is a tensor's row, and what
// all backends do with it alike.
//
// A phrase is (distance, length, next token): the longest match that starts before the phrase does, with an unbounded
// window and self-overlap allowed, and the token after it.
//
// Layout, 16 words a token: the header (16 words); then, for each token of capacity, 15 words of what finds matches,
// and the token. All zeros is the empty state, and the capacity follows from the number of words. The CPU finds matches
// with a suffix tree (lz77.h), a GPU by comparing tokens (cuda/lz77_append.cu), for which it keeps where the pending
// phrase occurs. The seal says which of the two is there; the other can be made from the tokens.
#pragma once

#include <cstdint>

#include "host_device.h"

namespace lil::lz77 {

constexpr int64_t kTokenWords = 16;
constexpr int64_t kMaxCapacity = int64_t{1} << 24;  // any sequence's size in bits stays within int32

// int32 words that hold the parse of up to `capacity` tokens, 1 to kMaxCapacity.
constexpr int64_t state_size(int64_t capacity) { return kTokenWords * (capacity + 1); }

// Bits that name one of `choices` things, at most 2^32: ceil(log2(choices)).
LIL_HOST_DEVICE constexpr int32_t index_bits(int64_t choices) {
  return 32 - leading_zeros(static_cast<uint32_t>(choices - 1));
}

struct Header {
  int32_t num_tokens;
  int32_t suffix;         // the first suffix that is not a leaf yet
  int32_t node;           // the deepest node visited on its path
  int32_t num_nodes;      // the root, node 0, not counted
  int32_t phrase;         // where the pending phrase starts
  int32_t phrases, bits;  // of the completed phrases
  int32_t seal;

  bool operator==(const Header&) const = default;
};

// What is kept to find matches. Its code is in the seal.
enum class Kept : int32_t { kTree = 0x4c5a3737, kOccurrences };

// A view of the array, with what all backends keep alike; it owns nothing.
class State {
 public:
  LIL_HOST_DEVICE State(int32_t* state, int64_t words)
      : capacity_(words / kTokenWords - 1 < kMaxCapacity ? words / kTokenWords - 1 : kMaxCapacity),
        header_(reinterpret_cast<Header*>(state)),
        kept_(state + kTokenWords),
        tokens_(kept_ + capacity_ * (kTokenWords - 1)) {}

  LIL_HOST_DEVICE int64_t capacity() const { return capacity_; }
  LIL_HOST_DEVICE int32_t num_tokens() const { return header_->num_tokens; }

  // The size: phrases so far, the pending one included.
  LIL_HOST_DEVICE int32_t phrases() const { return header_->phrases + (pending() > 0); }

  // The same in bits. token_bits: index_bits(vocab_size).
  LIL_HOST_DEVICE int32_t bits(int32_t token_bits) const {
    return header_->bits + (pending() > 0 ? phrase_bits(header_->phrase, pending(), token_bits) : 0);
  }

  // A phrase in bits: which earlier position, or none; Elias gamma of the tokens it covers; its last token.
  LIL_HOST_DEVICE static int32_t phrase_bits(int32_t start, int32_t length, int32_t token_bits) {
    return index_bits(int64_t{start} + 1) + 2 * (31 - leading_zeros(length)) + 1 + token_bits;
  }

  // Whether the header can be one that append left here, in an array of this size: uninitialised, overwritten or
  // resized arrays fail. What it does not see is damage further on.
  LIL_HOST_DEVICE bool valid() const {
    const Header& h = *header_;
    if (h.num_tokens == 0) return h == Header{};
    const auto within = [](int32_t value, int64_t limit) { return value >= 0 && value <= limit; };
    return h.num_tokens > 0 && h.num_tokens <= capacity_ && (keeps(Kept::kTree) || keeps(Kept::kOccurrences)) &&
           within(h.suffix, h.num_tokens) && within(h.phrase, h.num_tokens) && within(h.num_nodes, h.num_tokens - 1) &&
           within(h.node, h.num_nodes) && within(h.phrases, h.num_tokens) && h.bits >= 0;
  }

  LIL_HOST_DEVICE bool keeps(Kept what) const { return header_->seal == seal(what); }

 protected:
  LIL_HOST_DEVICE int32_t seal(Kept what) const { return static_cast<int32_t>(static_cast<int32_t>(what) ^ capacity_); }
  LIL_HOST_DEVICE int32_t pending() const { return header_->num_tokens - header_->phrase; }

  int64_t capacity_;
  Header* header_;
  int32_t* kept_;  // kTokenWords - 1 words a token of capacity
  int32_t* tokens_;
};

}  // namespace lil::lz77

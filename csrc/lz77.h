// The incremental greedy LZ77 parse of a token sequence, held wholly in one int32 array so that it is a tensor's row.
//
// A phrase is (distance, length, next token): the longest match that starts before the phrase does, with an unbounded
// window and self-overlap allowed, and the token after it. What finds matches is a suffix tree grown online (Ukkonen):
// a suffix becomes a leaf with the first token that tells it from everything that starts earlier. So the phrase that
// starts at i ends with the very token that makes suffix i a leaf: the parse is the tree's own progress, and a token
// costs amortised constant time.
//
// Layout, 16 words a token: the header (16 words); then, for each token of capacity, one tree node (8 words), 7/4 hash
// slots (7 words) and the token. All zeros is the empty state, and the capacity follows from the number of words.
#pragma once

#include <algorithm>
#include <bit>
#include <cstdint>

namespace lil::lz77 {

constexpr int64_t kTokenWords = 16;
constexpr int64_t kMaxCapacity = int64_t{1} << 24;  // any sequence's size in bits stays within int32

// int32 words that hold the parse of up to `capacity` tokens, 1 to kMaxCapacity.
constexpr int64_t state_size(int64_t capacity) { return kTokenWords * (capacity + 1); }

// Bits that name one of `choices` things: ceil(log2(choices)).
constexpr int32_t index_bits(int64_t choices) { return std::bit_width(static_cast<uint64_t>(choices - 1)); }

// A view of the array; it owns nothing.
class Parse {
 public:
  Parse(int32_t* state, int64_t words)
      : capacity_(std::min(words / kTokenWords - 1, kMaxCapacity)),
        num_slots_(capacity_ * 7 / 4),
        header_(reinterpret_cast<Header*>(state)),
        nodes_(reinterpret_cast<Node*>(state + kTokenWords)),
        slots_(reinterpret_cast<Slot*>(nodes_ + capacity_)),
        tokens_(state + kTokenWords + capacity_ * (kTokenWords - 1)) {}

  int64_t capacity() const { return capacity_; }
  int32_t num_tokens() const { return header_->num_tokens; }

  // The size: phrases so far, the pending one included.
  int32_t phrases() const { return header_->phrases + (pending() > 0); }

  // The same in bits. token_bits: index_bits(vocab_size).
  int32_t bits(int32_t token_bits) const { return header_->bits + (pending() > 0 ? phrase_bits(token_bits) : 0); }

  // Whether the header can be one that append left here, in an array of this size: uninitialised, overwritten or
  // resized arrays fail. What it does not see is damage further on.
  bool valid() const {
    const Header& h = *header_;
    if (h.num_tokens == 0) return h == Header{};
    const auto within = [](int32_t value, int32_t limit) { return value >= 0 && value <= limit; };
    return h.num_tokens > 0 && h.num_tokens <= capacity_ && h.seal == seal() && within(h.suffix, h.num_tokens) &&
           within(h.phrase, h.num_tokens) && within(h.num_nodes, h.num_tokens - 1) && within(h.node, h.num_nodes) &&
           within(h.phrases, h.num_tokens) && h.bits >= 0;
  }

  // For a valid state that is not full, and a token that is not negative.
  void append(int32_t token, int32_t token_bits) {
    Header& h = *header_;
    h.seal = seal();
    const int32_t end = h.num_tokens++;
    tokens_[end] = token;
    // Each suffix that the token tells from what came before becomes a leaf, the longest first.
    int32_t unlinked = 0;  // the node split off last; the next suffix, one token shorter, shows where its link goes
    for (; h.suffix <= end; ++h.suffix, h.node = nodes_[h.node].link) {
      const int32_t length = end - h.suffix, leaf = ~h.suffix;
      if (Edge* edge = descend(length)) {
        const int32_t child = edge->child;
        const int32_t next = tokens_[(child < 0 ? ~child : nodes_[child].position) + length];
        if (next == token) break;
        const int32_t node = ++h.num_nodes;
        nodes_[node] = {h.suffix, length, 0, 0, {{next, child}, {token, leaf}}};
        edge->child = node;
        if (unlinked) nodes_[unlinked].link = node;
        unlinked = node;
      } else {
        if (unlinked) nodes_[unlinked].link = h.node;
        unlinked = 0;
        Edge& out = find(h.node, token);
        if (out.child) break;
        out.child = leaf;
      }
    }
    if (h.suffix > h.phrase) {
      h.bits += phrase_bits(token_bits);
      ++h.phrases;
      h.phrase = h.num_tokens;
    }
  }

 private:
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

  // child > 0: a node; child < 0: the leaf of suffix ~child; 0: an empty place.
  struct Edge {
    int32_t token, child;
  };

  // tokens[position, position + depth) spell its path; link is the node of that path less its first token. The first
  // two edges live here, others in the hash table. Nodes but the root have at least two and leaves are at most n, so n
  // tokens make fewer than n nodes and fewer than n hashed edges.
  struct Node {
    int32_t position, depth, link, unused;
    Edge edges[2];
  };

  struct Slot {
    int32_t node, unused;
    Edge edge;
  };

  static_assert(sizeof(Header) <= 4 * kTokenWords && sizeof(Node) == 32 && sizeof(Slot) == 16);

  int32_t seal() const { return static_cast<int32_t>(0x4c5a3737 ^ capacity_); }
  int32_t pending() const { return header_->num_tokens - header_->phrase; }

  // The pending phrase: which earlier position, or none; Elias gamma of the tokens it covers; its last token.
  int32_t phrase_bits(int32_t token_bits) const {
    const int32_t gamma = 2 * std::bit_width(static_cast<uint32_t>(pending())) - 1;
    return index_bits(int64_t{header_->phrase} + 1) + gamma + token_bits;
  }

  uint64_t home(int32_t node, int32_t token) const {
    uint64_t hash = (static_cast<uint64_t>(node) << 32 | static_cast<uint32_t>(token)) * 0x9e3779b97f4a7c15u;
    hash = (hash ^ hash >> 32) * 0xd6e8feb86659fd93u;
    return (hash >> 32) * num_slots_ >> 32;
  }

  // The edge of `node` that begins with `token`; or else the empty place for it, its key already filled in.
  Edge& find(int32_t node, int32_t token) {
    for (Edge& edge : nodes_[node].edges) {
      if (edge.child && edge.token != token) continue;
      edge.token = token;
      return edge;
    }
    for (uint64_t i = home(node, token);; i = i + 1 < num_slots_ ? i + 1 : 0) {
      auto& [owner, unused, edge] = slots_[i];
      if (edge.child && (owner != node || edge.token != token)) continue;
      owner = node;
      edge.token = token;
      return edge;
    }
  }

  // Moves down the path of the suffix's first `length` tokens, to its last node. The edge along which the path ends,
  // or null where it ends at the node.
  Edge* descend(int32_t length) {
    Header& h = *header_;
    while (nodes_[h.node].depth < length) {
      Edge& edge = find(h.node, tokens_[h.suffix + nodes_[h.node].depth]);
      if (edge.child < 0 || nodes_[edge.child].depth > length) return &edge;
      h.node = edge.child;
    }
    return nullptr;
  }

  int64_t capacity_;
  uint64_t num_slots_;
  Header* header_;
  Node* nodes_;
  Slot* slots_;
  int32_t* tokens_;
};

}  // namespace lil::lz77

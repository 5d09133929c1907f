// The LZ77 parse by a suffix tree that is grown online (Ukkonen): a suffix becomes a leaf with the first token that
// tells it from everything that starts earlier. So the phrase that starts at i ends with the very token that makes
// suffix i a leaf: the parse is the tree's own progress, and a token costs amortised constant time.
//
// What it keeps for each token of capacity: one tree node (8 words), and 7/4 hash slots (7 words).
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "lz77_state.h"

namespace lil::lz77 {

class Parse : public State {
 public:
  Parse(int32_t* state, int64_t words)
      : State(state, words),
        num_slots_(capacity_ * 7 / 4),
        nodes_(reinterpret_cast<Node*>(kept_)),
        slots_(reinterpret_cast<Slot*>(nodes_ + capacity_)) {}

  // Of a valid state that has no tree: makes it.
  void grow_tree(int32_t token_bits) {
    const std::vector<int32_t> tokens(tokens_, tokens_ + num_tokens());
    std::fill(reinterpret_cast<int32_t*>(header_), tokens_, 0);
    for (const int32_t token : tokens) append(token, token_bits);
  }

  // For a valid state that has the tree and is not full, and a token that is not negative.
  void append(int32_t token, int32_t token_bits) {
    Header& h = *header_;
    h.seal = seal(Kept::kTree);
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
      h.bits += phrase_bits(h.phrase, h.num_tokens - h.phrase, token_bits);
      ++h.phrases;
      h.phrase = h.num_tokens;
    }
  }

 private:
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

  uint64_t num_slots_;
  Node* nodes_;
  Slot* slots_;
};

}  // namespace lil::lz77

"""R-KV (Cai et al., arXiv 2505.24133).

A KV head holds up to `budget + buffer` tokens. Where they are there, it is cut to `budget`: the last `recent` tokens
stay, and of the others those of the highest `mix * importance - (1 - mix) * redundancy`. Importance is the softmax
weight that the last `recent` queries give a token among these others, the highest of a group's query heads, the mean
over the queries, the highest of 7 neighbours. Redundancy is the softmax of `lil_ops.key_redundancy`: a key that is like
many others goes, and the newest of its kind stays. A longer prompt is cut at once.
Published: cut where the sequence's length is a multiple of `buffer`, here where so many were added; a `mix` of 0.1 in
the paper, 0.07 in the code; neighbours in a cache that was cut before are by score there, by position here. Weights are
without a softcap.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from lil_ops import ops
from lil_ops.cache import Room
from lil_ops.policies.base import Policy
from lil_ops.policies.slots import TokenSlots


class RKV(TokenSlots):
    """State beside that of `TokenSlots`, one a layer: ``queries [batch, q_heads, recent, head_dim]`` float32, the last
    ones in any order, times the scale of the logits."""

    name = "rkv"
    rule = "cut every `buffer` tokens: keys that the last queries read, and that are unlike the others"
    source = "R-KV, arXiv 2505.24133"
    on_device = False  # when to cut
    NEIGHBOURS = 7

    def __init__(
        self,
        budget=None,
        *,
        recent: int = 8,
        buffer: int = 128,
        mix: float = 0.1,
        threshold: float = 0.5,
        **options,
    ):
        super().__init__(budget, recent=recent, **options)
        self.check_whole(buffer=(buffer, 1))
        self.check_number(mix=(mix, 0, 1), threshold=(threshold, -1, 1))
        self.buffer, self.mix, self.threshold = buffer, mix, threshold

    def room_of(self, layer):
        return Room(total=self.budget_of(layer) + self.buffer, kept=self.budget_of(layer))

    def begin(self, cache, prompt_lens):
        super().begin(cache, prompt_lens)
        self.queries: list[torch.Tensor | None] = [None] * len(cache.rooms)

    def prompt_priority(self, layer, i, chunk, cache):
        row, last = cache.step_of(layer).rows[i], chunk.q[:, -self.recent :] * chunk.scale
        place = torch.arange(cache.lengths[row] - last.shape[1], cache.lengths[row], device=last.device) % self.recent
        self._queries_of(layer, len(last), cache)[row, :, place] = last.float()
        if chunk.k.shape[1] <= self.budget_of(layer):
            return super().prompt_priority(layer, i, chunk, cache)
        return self.score(chunk.k, self.queries[layer][row], cache.page_size)

    def keep(self, layer, i, chunk, cache):
        kept, row = super().keep(layer, i, chunk, cache), cache.step_of(layer).rows[i]
        self.expect(layer, row, kept.shape[1], cache.lengths[row])
        return kept

    def write(self, layer, k, v, cache):
        self._cut(layer, cache)
        return Policy.write(self, layer, k, v, cache)

    def select(self, layer, q, cache, scale):
        step, queries = cache.step_of(layer), self._queries_of(layer, q.shape[1], cache)
        last = step.take(queries)
        place = step.once("place", lambda: (step.positions.long() - 1)[:, None, None, None] % self.recent)
        last.scatter_(2, place.expand(-1, q.shape[1], 1, q.shape[2]), (q * scale).float()[:, :, None])
        step.put(queries, last)
        return None

    def score(self, keys: torch.Tensor, queries: torch.Tensor, page_size: int) -> torch.Tensor:
        """``[kv_heads, tokens]``: how much each of ``keys [kv_heads, tokens, head_dim]`` is worth keeping to
        ``queries [q_heads, recent, head_dim]``. The last ``recent`` have no worth of their own: they stay."""
        heads, tokens, _ = keys.shape
        logits = queries.unflatten(0, (heads, -1)) @ keys[:, None, : -self.recent].float().mT
        importance = logits.amax(1).softmax(-1).mean(1)
        importance = F.max_pool1d(importance, self.NEIGHBOURS, 1, self.NEIGHBOURS // 2)
        pages = F.pad(keys, (0, 0, 0, -tokens % page_size)).unflatten(1, (-1, page_size)).transpose(0, 1)
        redundancy = ops.key_redundancy(
            pages,
            torch.arange(len(pages), dtype=torch.int32, device=keys.device)[None],
            torch.tensor([tokens], dtype=torch.int32, device=keys.device),
            threshold=self.threshold,
        )[0, :, :tokens].softmax(-1)
        score = self.mix * importance - (1 - self.mix) * redundancy[:, : -self.recent]
        return F.pad(score, (0, self.recent))

    def _queries_of(self, layer: int, q_heads: int, cache) -> torch.Tensor:
        """The layer's state, made when the first queries tell how many heads there are."""
        if self.queries[layer] is None:
            shape = cache.batch, q_heads, self.recent, cache.head_dim
            self.queries[layer] = torch.zeros(shape, device=cache.device)
        return self.queries[layer]

    def _cut(self, layer: int, cache) -> None:
        """Cut the rows that are full; how many tokens a row holds is known on the host."""
        step, room = cache.step_of(layer), self.room_of(layer)
        full = [i for i, held in enumerate(step.held) if held == room.total]
        if not full:
            return
        keep = torch.zeros(len(step.rows), cache.kv_heads, room.kept, dtype=torch.int32, device=cache.device)
        for i in full:
            row = step.rows[i]
            keys, _ = cache.gather(layer, i, room.total)
            score = self.score(keys, self.queries[layer][row], cache.page_size)
            positions = self.held[layer][row, :, : room.total]
            kept = self.best(layer, score, positions, room.kept, cache.lengths[row] - 1)
            keep[i] = kept
            self.held[layer][row, :, : room.kept] = positions.gather(1, kept)
            self.expect(layer, row, room.kept, cache.lengths[row] - 1)
        counts = [room.kept if i in full else 0 for i in range(len(step.rows))]
        counts = torch.tensor(counts, dtype=torch.int32, device=cache.device)
        ops.compact_kv(cache.k[layer], cache.v[layer], step.page_table, keep, counts)

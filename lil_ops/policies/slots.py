"""What policies share whose KV heads hold a fixed number of tokens, each in a slot of its own.

A new token takes the slot of the one that goes: evicting is overwriting. Keys are cached after RoPE, so the order of
slots means nothing to softmax.
"""

from __future__ import annotations

import torch

from lil_ops import ops
from lil_ops.cache import ALL, Room
from lil_ops.policies.base import Chunk, Policy


class TokenSlots(Policy):
    """Of a full head's tokens the one of the least priority goes, the earliest among equals; neither a sink nor one of
    the last ``recent`` does. Of a longer prompt a head keeps as many as its budget, by the same order.

    State, one a layer: ``held [batch, kv_heads, slots]`` int32, the token's position, -1: free; ``priority``, likewise,
    float32, that of the last token in a slot until `observe` renews it.
    """

    memory = "bounded"
    by_tokens = True
    watches_prompt = True

    def room_of(self, layer):
        return Room(total=self.budget_of(layer), kept=self.budget_of(layer))

    def begin(self, cache, prompt_lens):
        super().begin(cache, prompt_lens)
        self.held, self.priority = [], []
        for layer, room in enumerate(cache.rooms):
            slots = 0 if room == ALL else min(room.total or cache.max_tokens, cache.max_tokens)
            shape = cache.batch, cache.kv_heads, max(slots, self.sink + self.recent_of(layer))
            self.held.append(torch.full(shape, -1, dtype=torch.int32, device=cache.device))
            self.priority.append(torch.zeros(shape, device=cache.device))

    def held_positions(self, layer: int) -> torch.Tensor:
        """``[batch, kv_heads, slots]`` int32: the position of the token in each slot, -1: free."""
        return self.held[layer]

    def prompt_priority(self, layer: int, i: int, chunk: Chunk, cache) -> torch.Tensor:
        """``[kv_heads, tokens]``: the priority of each token of ``chunk.k``."""
        return chunk.k.new_zeros(chunk.k.shape[:2], dtype=torch.float32)

    def positions(self, layer: int, i: int, chunk: Chunk, cache) -> torch.Tensor:
        """``[kv_heads, tokens]``: the position of each token of ``chunk.k``."""
        step = cache.step_of(layer)
        heads, new, length = len(chunk.k), chunk.q.shape[1], cache.lengths[step.rows[i]]
        fresh = torch.arange(length - new, length, device=cache.device)
        return torch.cat([self.held[layer][step.rows[i], :, : step.held[i]], fresh.expand(heads, new)], 1)

    def keep(self, layer, i, chunk, cache):
        row = cache.step_of(layer).rows[i]
        positions = self.positions(layer, i, chunk, cache)
        priority = self.prompt_priority(layer, i, chunk, cache)
        count = min(self.room_of(layer).kept, positions.shape[1])
        kept = self.best(layer, priority, positions, count, cache.lengths[row])
        self.held[layer][row] = -1
        self.held[layer][row, :, : kept.shape[1]] = positions.gather(1, kept).int()
        self.priority[layer][row, :, : kept.shape[1]] = priority.gather(1, kept)
        return kept

    def best(
        self, layer: int, priority: torch.Tensor, positions: torch.Tensor, count: int, length: int
    ) -> torch.Tensor:
        """Ascending places ``[kv_heads, count]`` of those that stay; of equals the later."""
        first = length if self.protect_prompt else self.sink
        stay = (positions < first) | (positions >= length - self.recent_of(layer))
        later = positions.argsort(dim=1, descending=True)
        ranked = priority.masked_fill(stay, torch.inf).gather(1, later).argsort(dim=1, descending=True, stable=True)
        return later.gather(1, ranked)[:, :count].sort(1).values

    def write(self, layer, k, v, cache):
        step = cache.step_of(layer)
        held, priority = step.take(self.held[layer]), step.take(self.priority[layer])
        slots = ops.evict_pages(
            held,
            priority,
            step.positions,
            1,
            sink=self.sink,
            recent=self.recent_of(layer),
            protected_lens=self.protected_lens(cache, layer),
        )
        step.put(self.held[layer], held)
        cache.append(layer, k, v, slots=slots)
        return step.page_table, step.seq_lens

    def expect(self, layer: int, row: int, count: int, first: int) -> None:
        """Write down ahead what comes behind a row's ``count`` tokens, where nothing goes: ``first`` and so on."""
        behind = self.held[layer][row, :, count:]
        behind.copy_(torch.arange(behind.shape[1], device=behind.device) + first)

    def fold(self, layer: int, mass: torch.Tensor, cache, **options) -> None:
        """Renew the priorities by a step's mass, see `ops.fold_mass`."""
        step = cache.step_of(layer)
        priority = step.take(self.priority[layer])
        ops.fold_mass(priority, mass, step.take(self.held[layer]), step.positions, 1, **options)
        step.put(self.priority[layer], priority)


def prompt_mass(chunk: Chunk, queries: int | None = None, window: int | None = None) -> torch.Tensor:
    """``[kv_heads, tokens]`` float32: the softmax mass that each token of ``chunk.k`` gets from the last ``queries`` of
    the new ones (None: all), summed over them and over the group. window: a query's mass on its last so many tokens
    counts alone (None: on all)."""
    heads, tokens, _ = chunk.k.shape
    new = chunk.q.shape[1]
    first = max(0, new - (queries or new))
    mass = torch.zeros(heads, tokens, device=chunk.k.device)
    places = torch.arange(tokens, device=chunk.k.device)
    block = max(1, (1 << 22) // (len(chunk.q) * tokens))  # 16 MB of logits at a time
    for start in range(first, new, block):
        stop = min(start + block, new)
        q = chunk.q[:, start:stop].unflatten(0, (heads, -1)).float()
        logits = q @ chunk.k[:, None].float().mT * chunk.scale
        if chunk.softcap:
            logits = chunk.softcap * torch.tanh(logits / chunk.softcap)
        last = torch.arange(tokens - new + start, tokens - new + stop, device=chunk.k.device)
        weights = logits.masked_fill(places > last[:, None], -torch.inf).softmax(-1)
        if window is not None:
            weights = weights.masked_fill(places <= last[:, None] - window, 0.0)
        mass += weights.sum((1, 2))
    return mass

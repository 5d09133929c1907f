"""RaaS (Hu et al., arXiv 2502.11147).

A KV head holds a fixed number of pages. At each step the pages of the most attention, the top `share` of those held,
get "now" as their time stamp; where a new page is opened and the head is full, the page of the oldest stamp goes, among
equals the earliest. The prompt's pages stay, so that a prompt must leave room in the budget.
Published: attention is estimated from a representative key of each page. Here it is the softmax mass that the page had
in the step, which the attention gives at no further cost, summed over the heads of a group (GQA), which share a
decision.
"""

from __future__ import annotations

import torch

from lil_ops import ops
from lil_ops.cache import Room
from lil_ops.policies.base import Policy, Selection


class RaaS(Policy):
    """State, one a layer: ``held [batch, kv_heads, capacity]`` int32, the logical page in each slot, -1: free;
    ``stamp``, likewise, float32; and the heads' own page tables ``[batch, kv_heads, max_pages]``."""

    name = "raas"
    rule = "pages that were lately among the most attended, and the prompt"
    source = "RaaS, arXiv 2502.11147"
    memory = "bounded"
    mass = "page"
    watches_prompt = True

    def __init__(self, budget=None, *, share: float = 0.5, **options):
        super().__init__(budget, **{"protect_prompt": True, **options})
        self.check_number(share=(share, 0, 1))
        if share == 0:
            raise ValueError(f"policy {self.name}: share: expected above 0, got {share}")
        if not self.protect_prompt:
            raise ValueError(f"policy {self.name}: protect_prompt: expected True, its prompt's pages stay; got False")
        self.share = share

    def room_of(self, layer):
        total = self.budget_of(layer) // self.page_size * self.page_size
        return Room(total=total, kept=total)

    def begin(self, cache, prompt_lens):
        super().begin(cache, prompt_lens)
        self.held, self.stamp, self.tables = [], [], []
        for layer, room in enumerate(cache.rooms):
            heads = cache.batch, cache.kv_heads
            slots, pages = (cache.pool_of(layer).max_pages, -(-cache.max_tokens // cache.page_size))
            if room.total is None:
                slots = pages = 0
            self.held.append(torch.full((*heads, slots), -1, dtype=torch.int32, device=cache.device))
            self.stamp.append(torch.zeros(*heads, slots, device=cache.device))
            self.tables.append(torch.full((*heads, pages), -1, dtype=torch.int32, device=cache.device))

    def held_positions(self, layer: int) -> torch.Tensor:
        """``[batch, kv_heads, slots]`` int32: each token's position, -1: free. Past the newest: not yet."""
        held = self.held[layer][..., None]
        within = torch.arange(self.page_size, dtype=torch.int32, device=held.device)
        return torch.where(held < 0, held, held * self.page_size + within).flatten(2)

    def keep(self, layer, i, chunk, cache):
        step = cache.step_of(layer)
        row = step.rows[i]
        self.check_budget(cache, [cache.lengths[row]])
        pages = -(-cache.lengths[row] // cache.page_size)
        self.tables[layer][row] = self.held[layer][row] = -1
        self.tables[layer][row, :, :pages] = step.page_table[i, :pages]
        self.held[layer][row, :, :pages] = torch.arange(pages, dtype=torch.int32, device=cache.device)
        self.stamp[layer][row] = cache.lengths[row]

    def write(self, layer, k, v, cache):
        step = cache.step_of(layer)
        state = self.held[layer], self.tables[layer]
        held, table = map(step.take, state)
        ops.evict_pages(
            held,
            step.take(self.stamp[layer]),
            step.positions,
            cache.page_size,
            sink=self.sink,
            recent=self.recent,
            protected_lens=step.prompt_lens,
            page_table=table,
            # Slots are mapped before they are filled; those that are not yet are not looked at.
            slot_pages=step.once("slot pages", lambda: step.page_table.clamp(min=0)),
        )
        for whole, part in zip(state, (held, table), strict=True):
            step.put(whole, part)
        cache.append(layer, k, v, page_table=table, seq_lens=step.positions)
        return table, step.positions

    def select(self, layer, q, cache, scale):
        step, held = cache.step_of(layer), self.held[layer]
        # Rows that stand still hold pages, and read none.
        counts = step.once(
            ("counts", held.shape[-1]),
            lambda: ((step.positions > 0) * held.shape[-1])[:, None].expand(-1, cache.kv_heads).int().contiguous(),
        )
        return Selection(step.take(held), counts)

    def observe(self, layer, mass, selection, cache):
        step = cache.step_of(layer)
        stamp = step.take(self.stamp[layer])
        # A page that was just opened is stamped too.
        options = {"rule": "stamp", "share": self.share}
        ops.fold_mass(stamp, mass, selection.pages, step.positions, cache.page_size, **options)
        step.put(self.stamp[layer], stamp)

"""Sink (StreamingLLM, Xiao et al., arXiv 2309.17453).

Reads the first `sink` tokens and the most recent ones that the budget leaves room for.
Published: 4 sink tokens, positions counted inside the cache. Here: whole pages are read, and keys keep the
positions they were written with, so that one cache serves every policy.
`protect_prompt` reads the whole prompt in place of the sink alone.
"""

from __future__ import annotations

import torch

from lil_ops import ops
from lil_ops.policies.base import Policy, Selection


class Sink(Policy):
    name = "sink"
    rule = "first `sink` tokens and the most recent"
    source = "StreamingLLM, arXiv 2309.17453"

    def __init__(self, budget=None, *, sink: int = 4, **options):
        super().__init__(budget, sink=sink, **options)

    def begin(self, cache, prompt_lens):
        super().begin(cache, prompt_lens)
        # A page's score is its recency: its index.
        self._recency = torch.arange(cache.max_pages, dtype=torch.float32, device=cache.device)

    def begin_step(self, cache):
        step = cache.step
        recency = self._recency.expand(len(step.rows), cache.kv_heads, cache.max_pages)
        self._selections = {
            budget: Selection(
                *ops.select_pages(
                    recency,
                    step.seq_lens,
                    cache.page_size,
                    budget,
                    sink=self.sink,
                    recent=self.recent,
                    protected_lens=step.prompt_lens if self.protect_prompt else None,
                )
            )
            for budget in set(self.budgets)
        }

    def select(self, layer, q, cache, scale):
        return None if layer < self.dense_layers else self._selections[self.budget_of(layer)]

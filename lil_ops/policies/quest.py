"""Quest (Tang et al., arXiv 2406.10774).

Every page keeps the elementwise min and max of its keys. A step scores each page by the upper bound of q . k that
these allow, and reads the best pages. Published: pages of 16 tokens, the first two layers dense.
Published for one query head a KV head; here (GQA) the heads of a group share one decision, by their highest bound.
"""

from __future__ import annotations

from lil_ops import ops
from lil_ops.policies.base import Policy, Selection


class Quest(Policy):
    name = "quest"
    rule = "pages with the highest min/max bound of q . k"
    source = "arXiv 2406.10774"
    uses_summary = True

    def __init__(self, budget=None, *, dense_layers: int = 2, **options):
        super().__init__(budget, dense_layers=dense_layers, **options)

    def select(self, layer, q, cache, scale):
        if layer < self.dense_layers:
            return None
        step = cache.step
        scores = ops.score_pages(q, cache.summary[layer], step.page_table, step.seq_lens, cache.page_size, scale=scale)
        pages, counts = ops.select_pages(
            scores,
            step.seq_lens,
            cache.page_size,
            self.budget,
            sink=self.sink,
            recent=self.recent,
            protected_lens=step.prompt_lens if self.protect_prompt else None,
        )
        return Selection(pages, counts)

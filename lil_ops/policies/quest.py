"""Quest (Tang et al., arXiv 2406.10774).

Every page keeps the elementwise min and max of its keys. A step scores each page by the upper bound of q . k that
these allow, and reads the best pages. Published: pages of 16 tokens, the first two layers dense.
Published for one query head a KV head; here (GQA) the heads of a group share one decision, by their highest bound.
With ``scoring="meanstd"`` a page keeps mean and standard deviation, and its score estimates the mass of its keys
(`lil_ops.score_pages`) instead of bounding their logits. With ``summary_dtype="float8"`` summaries are float8_e4m3fn,
rounded so that bounds stay bounds (`lil_ops.append_kv`): scoring reads half the bytes that bf16 ones have, or a quarter
of fp32's.
"""

from __future__ import annotations

from typing import ClassVar

import torch

from lil_ops import ops
from lil_ops.policies.base import Policy, Selection


class Quest(Policy):
    name = "quest"
    rule = "pages with the highest min/max bound of q . k"
    source = "arXiv 2406.10774"
    tells_loss = True
    # The bound of minmax is far from the truth, and meanstd misses the first page's mass (docs/design.md, section 12).
    loss_options: ClassVar[dict[str, object]] = {"scoring": "meanstd", "sink": 1}

    def __init__(
        self,
        budget=None,
        *,
        dense_layers: int = 2,
        scoring: str = "minmax",
        summary_dtype: str | None = None,
        **options,
    ):
        super().__init__(budget, dense_layers=dense_layers, **options)
        if scoring not in ("minmax", "meanstd"):
            raise ValueError(f"policy {self.name}: scoring: expected 'minmax' or 'meanstd', got {scoring!r}")
        if summary_dtype not in (None, "float8"):
            raise ValueError(f"policy {self.name}: summary_dtype: expected None or 'float8', got {summary_dtype!r}")
        self.summary_mode = scoring
        self.summary_dtype = torch.float8_e4m3fn if summary_dtype else None

    def select(self, layer, q, cache, scale):
        step = cache.step_of(layer)
        scores = ops.score_pages(
            q,
            cache.summary[layer],
            step.page_table,
            step.seq_lens,
            cache.page_size,
            scale=scale,
            summary_mode=cache.summary_mode,
        )
        return Selection(*self.best_pages(layer, scores, cache), scores)

    def fused_step(self, layer, q, k, v, cache, *, scale, softcap, loss):
        if not self.follows(Quest, "write", "select", "best_pages"):
            return None
        step = cache.step_of(layer)
        out, _ = ops.sparse_decode_step(
            q,
            k,
            v,
            cache.k[layer],
            cache.v[layer],
            cache.summary[layer],
            step.page_table,
            step.seq_lens,
            self.budget_of(layer),
            sink=self.sink,
            recent=self.recent_of(layer),
            protected_lens=self.protected_lens(cache, layer),
            scale=scale,
            softcap=softcap,
            summary_mode=cache.summary_mode,
            loss=loss,
        )
        return out

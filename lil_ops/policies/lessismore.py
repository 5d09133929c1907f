"""LessIsMore (Yang et al., arXiv 2508.07101).

Few layers, the selection layers, read everything, and what they attend to is what the layers behind them read, the same
for all heads: the sink, the most recent tokens (a quarter of the budget), and for the rest the union of what the
query heads rank highest, all first choices before any second. Published: the first two layers dense, selection in
layer 2 and in one more about a third of the way; tokens, ranked by their logits.
Here pages are chosen, ranked by their softmax mass. `select_layers` names other selection layers.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from lil_ops.policies.base import Policy, Selection


class LessIsMore(Policy):
    name = "lessismore"
    rule = "what a selection layer attends to, the same for all heads and the layers behind it"
    source = "LessIsMore, arXiv 2508.07101"

    def __init__(
        self,
        budget=None,
        *,
        sink: int = 4,
        recent: int | None = None,
        dense_layers: int = 2,
        select_layers: Sequence[int] | None = None,
        **options,
    ):
        super().__init__(
            budget, sink=sink, recent=1 if recent is None else recent, dense_layers=dense_layers, **options
        )
        if select_layers is not None:
            if isinstance(select_layers, str) or not isinstance(select_layers, Sequence):
                raise ValueError(f"policy {self.name}: select_layers: expected a list of layers, got {select_layers!r}")
            self.check_whole(**{f"select_layers[{i}]": (layer, 0) for i, layer in enumerate(select_layers)})
        self._quarter, self.select_layers = recent is None, select_layers

    def begin(self, cache, prompt_lens):
        super().begin(cache, prompt_lens)
        layers = len(cache.k)
        given = self.select_layers
        if given is not None and not all(self.dense_layers <= layer < layers for layer in given):
            raise ValueError(
                f"policy {self.name}: select_layers: expected layers from {self.dense_layers} to {layers - 1}, "
                f"got {given}"
            )
        # What lies behind the dense layers reads the first one's choice, so that this one always selects.
        self._selecting = {self.dense_layers, *((layers // 3,) if given is None else given)}
        self._scores = None

    def recent_of(self, layer: int) -> int:
        return max(1, self.budget_of(layer) // 4) if self._quarter else self.recent

    def mass_of(self, layer):
        return "page" if layer in self._selecting else None

    def select(self, layer, q, cache, scale):
        if layer in self._selecting:
            return None
        budget = self.budget_of(layer)
        if budget not in self._choices:
            self._choices[budget] = Selection(*self.best_pages(layer, self._scores, cache))
        return self._choices[budget]

    def observe(self, layer, mass, selection, cache):
        size, heads = cache.page_size, mass.shape[1]
        page = torch.arange(mass.shape[2], device=mass.device)
        first_recent = (cache.step_of(layer).seq_lens - self.recent_of(layer)).clamp(min=0) // size
        always = (page < -(-self.sink // size)) | (page >= first_recent[:, None])
        order = mass.masked_fill(always[:, None], -1.0).argsort(dim=-1, descending=True, stable=True)
        rank = torch.empty_like(order).scatter_(-1, order, page.expand_as(order))
        # A page's place in the union: by its best rank, and of equal ranks by the head.
        head = torch.arange(heads, device=mass.device)[:, None]
        place = (rank * heads + head).amin(1, keepdim=True)
        self._scores = -place.float().expand(-1, cache.kv_heads, -1)
        self._choices = {}

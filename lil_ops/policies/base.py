"""The one interface of every policy. A policy calls operators only; its state lives in tensors made by `begin`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, NamedTuple

import torch

from lil_ops.cache import PagedKVCache


class Selection(NamedTuple):
    """The pages each KV head reads: ``pages [batch, kv_heads, capacity]`` (-1 padded), ``counts [batch, kv_heads]``."""

    pages: torch.Tensor
    counts: torch.Tensor


class Policy:
    """Which cached tokens a decode step reads.

    Args:
        budget: tokens a KV head may read, sink, recent and current page included; rounded down to whole pages. A float
            above 0 and up to 1 is a share of the longest that a sequence may become (the cache's ``max_tokens``). A
            list has one entry for each layer, dense ones included.
        sink: tokens at the start of the sequence that are always read. recent: tokens at its end, likewise (at least 1:
            the current one).
        protect_prompt: the whole prompt is always read, within the budget.
        dense_layers: the first so many layers read everything.

    The loop calls `begin` once a run, `begin_step` once a forward pass of one token a sequence, and `select` once a
    layer, after the layer's keys were appended.
    """

    name: ClassVar[str]
    rule: ClassVar[str]
    source: ClassVar[str]
    summary_mode: str | None = None  # what the cache keeps of each page's keys, see `lil_ops.append_kv`; None: nothing

    def __init__(
        self,
        budget: int | float | Sequence[int | float] | None = None,
        *,
        sink: int = 0,
        recent: int = 1,
        protect_prompt: bool = False,
        dense_layers: int = 0,
    ):
        if budget is None:
            raise ValueError(f"policy {self.name}: budget: expected a number of tokens (budget=...), got none")
        whole = {"sink": sink, "recent": recent, "dense_layers": dense_layers}
        for option, value in whole.items():
            if not isinstance(value, int) or isinstance(value, bool):
                raise ValueError(f"policy {self.name}: {option}: expected a whole number, got {value!r}")
        for option, least in (("sink", 0), ("recent", 1), ("dense_layers", 0)):
            if whole[option] < least:
                raise ValueError(f"policy {self.name}: {option}: expected at least {least}, got {whole[option]}")
        for entry in budget if isinstance(budget, Sequence) and not isinstance(budget, str) else [budget]:
            if isinstance(entry, float):
                if not 0 < entry <= 1:
                    raise ValueError(f"policy {self.name}: budget: expected a share above 0 and up to 1, got {entry}")
            elif not isinstance(entry, int) or isinstance(entry, bool):
                raise ValueError(f"policy {self.name}: budget: expected a whole number, or a share, got {entry!r}")
            elif entry < sink + recent + 1:
                raise ValueError(
                    f"policy {self.name}: budget: expected at least sink + recent + 1 = {sink + recent + 1} tokens, "
                    f"got {entry}"
                )
        self.budget, self.sink, self.recent = budget, sink, recent
        self.protect_prompt, self.dense_layers = protect_prompt, dense_layers

    def begin(self, cache: PagedKVCache, prompt_lens: list[int]) -> None:
        """Check the options against the cache and the prompts (``prompt_lens``: tokens), and make the state tensors."""
        self.check_budget(cache, prompt_lens)

    def check_budget(self, cache: PagedKVCache, prompt_lens: list[int]) -> None:
        """Make tokens of the budget, and raise ValueError unless what is always read fits in it.

        `begin` does it; where prompts came in pieces, whoever feeds them does it again once they are whole.
        """
        layers, size = len(cache.k), cache.page_size
        entries = self.budget if isinstance(self.budget, Sequence) else [self.budget]
        if isinstance(self.budget, Sequence) and len(entries) != layers:
            raise ValueError(
                f"policy {self.name}: budget: expected one entry for each of {layers} layers, got {len(entries)}"
            )
        self.budgets = [int(x * cache.max_tokens) if isinstance(x, float) else x for x in entries]
        budget = min(self.budgets, default=0)
        recent_pages = (self.recent + size - 2) // size + 1
        least = size * (-(-self.sink // size) + recent_pages)
        if budget < least:
            raise ValueError(
                f"policy {self.name}: budget: expected at least {least} tokens (the pages of size {size} that sink "
                f"{self.sink} and recent {self.recent} can touch), got {budget}"
            )
        longest = max(prompt_lens, default=0)
        least = size * (-(-longest // size) + recent_pages)
        if self.protect_prompt and budget < least:
            raise ValueError(
                f"policy {self.name}: budget: expected at least {least} tokens to protect a prompt of {longest} and "
                f"read the pages that recent {self.recent} can touch, got {budget}"
            )

    def budget_of(self, layer: int) -> int:
        """Tokens that a KV head of this layer may read; known once the run has begun."""
        return self.budgets[layer if isinstance(self.budget, Sequence) else 0]

    def begin_step(self, cache: PagedKVCache) -> None:
        """Work that all layers of a step share."""

    def select(self, layer: int, q: torch.Tensor, cache: PagedKVCache, scale: float) -> Selection | None:
        """The pages layer ``layer`` reads for queries ``q [batch, q_heads, head_dim]``; None reads all."""
        raise NotImplementedError

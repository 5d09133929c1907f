"""The one interface of every policy. State lives in tensors made by `begin`, one entry a cache row."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, NamedTuple

import torch

from lil_ops import ops
from lil_ops.cache import ALL, PagedKVCache, Room
from lil_ops.checks import is_whole


class Selection(NamedTuple):
    """The pages each KV head reads: ``pages [batch, kv_heads, capacity]`` (-1 padded), ``counts [batch, kv_heads]``,
    or None for ``counts``: every entry. scores: those of `ops.score_pages`, where they bound or estimate mass."""

    pages: torch.Tensor
    counts: torch.Tensor | None
    scores: torch.Tensor | None = None


class Chunk(NamedTuple):
    """One sequence in a forward pass of several tokens (a prompt, or a part of one), in one layer.

    q: ``[q_heads, new, head_dim]``. k, v: ``[kv_heads, held + new, head_dim]``, what the layer holds, slot by slot, and
    then the new tokens. scale, softcap: of the logits.
    """

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    scale: float
    softcap: float


class Policy:
    """Which cached tokens a decode step reads, and which a layer holds.

    Args:
        budget: tokens a KV head may read, sink, recent and current ones included; where pages are read, rounded down
            to whole pages. A float above 0 and up to 1 is a share of the longest that a sequence may become (the
            cache's ``max_tokens``). A list has one entry for each layer, dense ones included.
        sink: tokens at the start of the sequence that are always read. recent: tokens at its end, likewise (at least 1:
            the current one).
        protect_prompt: the whole prompt is always read, within the budget.
        dense_layers: the first so many layers hold and read everything.

    Called: `rooms` where the cache is made; `begin` once a run; in a forward pass of several tokens, `keep` once a
    layer and sequence, where ``watches_prompt``; in one of a single token a sequence, once a layer: `write`, `select`,
    and after the attention `observe`, where `mass_of` asks for it, or `fused_step` in place of them. Layers of which
    `reads_all` is true, and sliding-window layers, are not the policy's.

    An object keeps the state of one run: while a cache, a loop or an `Engine` goes on with it, others need their own.
    """

    name: ClassVar[str]
    rule: ClassVar[str]
    source: ClassVar[str]
    memory: ClassVar[str] = "grows"
    by_tokens: ClassVar[bool] = False  # what is read, and counted, is single tokens instead of pages
    summary_mode: str | None = None  # what the cache keeps of each page's keys, see `PagedKVCache`; None: nothing
    vectors: int = 2  # in a summary
    summary_dtype: torch.dtype | None = None  # None: the cache's
    mass: str | None = None  # what `mass_of` says of every layer
    watches_prompt: ClassVar[bool] = False
    on_device: ClassVar[bool] = True  # a decode step decides nothing on the host, so that a CUDA graph can repeat it
    tells_loss: ClassVar[bool] = False  # its selections have scores, from which `ops.information_loss` follows
    loss_options: ClassVar[dict[str, object]] = {}  # its defaults where a rule reads the loss

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
        self.check_whole(sink=(sink, 0), recent=(recent, 1), dense_layers=(dense_layers, 0))
        if not isinstance(protect_prompt, bool):
            raise ValueError(f"policy {self.name}: protect_prompt: expected True or False, got {protect_prompt!r}")
        for entry in budget if isinstance(budget, Sequence) and not isinstance(budget, str) else [budget]:
            if isinstance(entry, float):
                if not 0 < entry <= 1:
                    raise ValueError(f"policy {self.name}: budget: expected a share above 0 and up to 1, got {entry}")
            elif not is_whole(entry):
                raise ValueError(f"policy {self.name}: budget: expected a whole number, or a share, got {entry!r}")
            elif entry < sink + recent + 1:
                raise ValueError(
                    f"policy {self.name}: budget: expected at least sink + recent + 1 = {sink + recent + 1} tokens, "
                    f"got {entry}"
                )
        self.budget, self.sink, self.recent = budget, sink, recent
        self.protect_prompt, self.dense_layers = protect_prompt, dense_layers

    def check_whole(self, **options: tuple[int, int]) -> None:
        """Raise ValueError unless each option, given as (value, least), is a whole number of at least so much."""
        for option, (value, _) in options.items():
            if not is_whole(value):
                raise ValueError(f"policy {self.name}: {option}: expected a whole number, got {value!r}")
        for option, (value, least) in options.items():
            if value < least:
                raise ValueError(f"policy {self.name}: {option}: expected at least {least}, got {value}")

    def check_number(self, **options: tuple[float, float, float]) -> None:
        """Raise ValueError unless each option, given as (value, least, most), is a number in between."""
        for option, (value, least, most) in options.items():
            if not isinstance(value, int | float) or isinstance(value, bool) or not least <= value <= most:
                raise ValueError(f"policy {self.name}: {option}: expected from {least} to {most}, got {value!r}")

    def reads_all(self, layer: int) -> bool:
        """Whether this layer holds and reads everything."""
        return layer < self.dense_layers

    def rooms(self, num_layers: int, max_tokens: int, page_size: int) -> list[Room]:
        """What each layer of a cache has to hold. Raises ValueError for a list of budgets of another length."""
        self.page_size = page_size
        self._set_budgets(num_layers, max_tokens)
        return [ALL if self.reads_all(layer) else self.room_of(layer) for layer in range(num_layers)]

    def room_of(self, layer: int) -> Room:
        """What a layer has to hold that is the policy's."""
        return ALL

    def begin(self, cache: PagedKVCache, prompt_lens: list[int]) -> None:
        """Check the options against the cache and the prompts (``prompt_lens``: tokens), and make the state tensors."""
        self.check_budget(cache, prompt_lens)

    def check_budget(self, cache: PagedKVCache, prompt_lens: list[int]) -> None:
        """Make tokens of the budget, and raise ValueError unless what is always read fits in it.

        `begin` does it; where prompts came in pieces, whoever feeds them does it again once they are whole.
        """
        self._set_budgets(len(cache.k), cache.max_tokens)
        size = 1 if self.by_tokens else cache.page_size
        what = "the tokens" if self.by_tokens else f"the pages of size {size}"
        longest = max(prompt_lens, default=0)
        for budget, recent in sorted({(self.budget_of(i), self.recent_of(i)) for i in range(len(cache.k))}):
            recent_pages = (recent + size - 2) // size + 1
            least = size * (-(-self.sink // size) + recent_pages)
            if budget < least:
                raise ValueError(
                    f"policy {self.name}: budget: expected at least {least} tokens ({what} that sink {self.sink} and "
                    f"recent {recent} can touch), got {budget}"
                )
            least = size * (-(-longest // size) + recent_pages)
            if self.protect_prompt and budget < least:
                raise ValueError(
                    f"policy {self.name}: budget: expected at least {least} tokens to protect a prompt of {longest} "
                    f"and read {what} that recent {recent} can touch, got {budget}"
                )

    def budget_of(self, layer: int) -> int:
        """Tokens that a KV head of this layer may read; known once the cache is made."""
        return self.budgets[layer if isinstance(self.budget, Sequence) else 0]

    def recent_of(self, layer: int) -> int:
        """``recent`` of this layer."""
        return self.recent

    def protected_lens(self, cache: PagedKVCache, layer: int) -> torch.Tensor | None:
        """What `ops.select_pages` and `ops.evict_pages` take under this name."""
        return cache.step_of(layer).prompt_lens if self.protect_prompt else None

    def best_pages(
        self, layer: int, scores: torch.Tensor, cache: PagedKVCache, budget: int | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """`ops.select_pages` by ``scores [batch, kv_heads, max_pages]`` under the policy's options: pages and counts.

        budget: in place of the layer's.
        """
        return ops.select_pages(
            scores,
            cache.step_of(layer).seq_lens,
            cache.page_size,
            self.budget_of(layer) if budget is None else budget,
            sink=self.sink,
            recent=self.recent_of(layer),
            protected_lens=self.protected_lens(cache, layer),
        )

    def mass_of(self, layer: int) -> str | None:
        """Which softmax mass `observe` is given: of each ``"page"`` or ``"token"`` read; None: it is not called."""
        return self.mass

    def keep(self, layer: int, i: int, chunk: Chunk, cache: PagedKVCache) -> torch.Tensor | None:
        """Which tokens of ``chunk`` (that of the step's ``i``-th row) the layer goes on holding.

        ``[kv_heads, tokens]`` ascending places in ``chunk.k``, as many as the layer's `Room` says; None: all.
        """
        return None

    def write(
        self, layer: int, k: torch.Tensor, v: torch.Tensor, cache: PagedKVCache
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Store the step's keys and values ``[batch, kv_heads, head_dim]``; the table and lengths to attend by."""
        step = cache.step_of(layer)
        cache.append(layer, k, v)
        return step.page_table, step.seq_lens

    def select(self, layer: int, q: torch.Tensor, cache: PagedKVCache, scale: float) -> Selection | None:
        """The pages layer ``layer`` reads for queries ``q [batch, q_heads, head_dim]``; None: all that it holds."""
        return None

    def observe(self, layer: int, mass: torch.Tensor, selection: Selection | None, cache: PagedKVCache) -> None:
        """The softmax mass of what was read, as `ops.sparse_decode` writes it for ``selection``."""

    def fused_step(
        self,
        layer: int,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        cache: PagedKVCache,
        *,
        scale: float | None,
        softcap: float,
        loss: torch.Tensor | None,
    ) -> torch.Tensor | None:
        """`write`, `select` and the attention by one operator, where one does what these methods say; None where none
        does, and nothing was done.

        Arguments and result are theirs: ``[batch, heads, head_dim]``. loss: ``[batch, q_heads]`` float32, the step's
        information loss; written; or None. Asked only where every row adds a token and nothing is observed.
        """
        return None

    def follows(self, policy: type[Policy], *methods: str) -> bool:
        """Whether these methods are still those of ``policy``: overridden neither by a subclass nor on the object."""
        return all(getattr(getattr(self, name), "__func__", None) is getattr(policy, name) for name in methods)

    def _set_budgets(self, num_layers: int, max_tokens: int) -> None:
        entries = self.budget if isinstance(self.budget, Sequence) else [self.budget]
        if isinstance(self.budget, Sequence) and len(entries) != num_layers:
            raise ValueError(
                f"policy {self.name}: budget: expected one entry for each of {num_layers} layers, got {len(entries)}"
            )
        self.budgets = [int(x * max_tokens) if isinstance(x, float) else x for x in entries]

"""InfLLM (Xiao et al., arXiv 2402.04617).

The sink and a local window (`recent`, half the budget) are always read, and of the rest the blocks whose representative
tokens score highest. A token's weight is the softmax mass that it got from the queries whose window covered it; when a
block leaves the window, the keys of its `representatives` heaviest tokens stand for it from then on. A block's score is
the sum of q . k over them and over all heads, so that the heads of a layer read the same blocks. That is the q . k of
their mean, which is all that is kept.
Here blocks are pages (published: 128 tokens); prompts are read densely; keys keep their RoPE positions (published:
beyond the window all at one distance); the representatives are chosen for each KV head.
"""

from __future__ import annotations

import torch

from lil_ops import ops
from lil_ops.policies.base import Policy, Selection
from lil_ops.policies.slots import grouped, prompt_mass


class InfLLM(Policy):
    """State, one a layer: ``weight [batch, kv_heads, tokens]`` float32, the mass gathered inside the window."""

    name = "infllm"
    rule = "a local window, and blocks by their representative keys, one choice a layer"
    source = "InfLLM, arXiv 2402.04617"
    mass = "token"
    summary_mode = "representative"
    watches_prompt = True

    def __init__(self, budget=None, *, sink: int = 4, recent: int | None = None, representatives: int = 4, **options):
        super().__init__(budget, sink=sink, recent=1 if recent is None else recent, **options)
        self.check_whole(representatives=(representatives, 1))
        if representatives > 8:
            raise ValueError(f"policy {self.name}: representatives: expected at most 8, got {representatives}")
        self.vectors, self.representatives = 1, representatives
        self._half = recent is None

    def recent_of(self, layer: int) -> int:
        return max(1, self.budget_of(layer) // 2) if self._half else self.recent

    def begin(self, cache, prompt_lens):
        super().begin(cache, prompt_lens)
        tokens = -(-cache.max_tokens // cache.page_size) * cache.page_size
        # One place more, for mass that does not count.
        shape = cache.batch, cache.kv_heads, tokens + 1
        self.weight = [torch.zeros(shape, device=cache.device) for _ in cache.rooms]
        self._within = torch.arange(cache.page_size, device=cache.device)
        self._heads = torch.arange(cache.kv_heads, device=cache.device)[:, None]

    def keep(self, layer, i, chunk, cache):
        step = cache.step_of(layer)
        row, size, tokens = step.rows[i], cache.page_size, chunk.k.shape[1]
        weight = self.weight[layer][row]
        if step.held[i] == 0:
            weight.zero_()
        weight[:, :tokens] += prompt_mass(chunk, window=self.recent_of(layer))
        pages = max(0, tokens + 1 - self.recent_of(layer)) // size
        if pages:
            best = self._heaviest(weight[:, : pages * size].unflatten(1, (pages, size)))
            keys = chunk.k[:, : pages * size].unflatten(1, (pages, size))
            keys = keys.gather(2, best[..., None].expand(*best.shape, keys.shape[-1]))
            self._represent(layer, cache, step.page_table[i, :pages].long(), keys.transpose(0, 1))

    def select(self, layer, q, cache, scale):
        step, size, recent = cache.step_of(layer), cache.page_size, self.recent_of(layer)
        # The last page to leave the window, at this step or some steps ago. Its weights and keys change no more: doing
        # it again changes nothing, and no launch depends on the lengths.
        physical, places = step.once(("left", recent), lambda: self._left(step, recent))
        weight = step.take(self.weight[layer])
        best = self._heaviest(weight.gather(2, places.expand(-1, cache.kv_heads, -1)))
        self._represent(layer, cache, physical, cache.k[layer][physical[:, None, None], self._heads, best])
        scores = ops.score_pages(
            q,
            cache.summary[layer],
            step.page_table,
            step.seq_lens,
            size,
            scale=scale,
            summary_mode="representative",
        )
        return Selection(*self.best_pages(layer, scores.sum(1, keepdim=True).expand_as(scores), cache))

    def observe(self, layer, mass, selection, cache):
        step, recent = cache.step_of(layer), self.recent_of(layer)
        weight = step.take(self.weight[layer])
        first = step.once(("first", recent), lambda: (step.seq_lens - recent).clamp(min=0)[:, None, None, None])
        tokens = torch.add(self._within, selection.pages[..., None], alpha=cache.page_size)
        tokens.masked_fill_(tokens < first, weight.shape[2] - 1)  # negative where nothing is listed
        weight.scatter_add_(2, tokens.flatten(2), grouped(mass, cache.kv_heads))
        step.put(self.weight[layer], weight)

    def _left(self, step, recent: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Of the last page that has left the window: the physical page ``[batch]``, and the places of its tokens
        ``[batch, 1, page_size]``. Where none has, page 0, which is read while it is in the window, whatever its score.
        """
        page = ((step.seq_lens - recent) // self.page_size - 1).clamp(min=0)[:, None].long()
        return step.page_table.gather(1, page)[:, 0].long(), page[..., None] * self.page_size + self._within

    def _heaviest(self, weight: torch.Tensor) -> torch.Tensor:
        """``[..., page_size]`` -> ``[..., representatives]``: places of the heaviest, of equals any."""
        return weight.topk(self.representatives, sorted=False).indices

    def _represent(self, layer, cache, physical, keys) -> None:
        """Let keys ``[pages, kv_heads, representatives, head_dim]`` stand for their pages by their mean, since
        the sum of q . k over them is as much as that of q with it."""
        cache.summary[layer][physical] = keys.mean(2, keepdim=True)

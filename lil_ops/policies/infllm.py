"""InfLLM (Xiao et al., arXiv 2402.04617).

The sink and a local window (`recent`, half the budget) are always read, and of the rest the blocks whose representative
tokens score highest. A token's weight is the softmax mass that it got from the queries whose window covered it; when a
block leaves the window, the keys of its `representatives` heaviest tokens stand for it from then on. A block's score is
the sum of q . k over them and over all heads, so that the heads of a layer read the same blocks.
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
        self.vectors = representatives
        self._half = recent is None

    def recent_of(self, layer: int) -> int:
        return max(1, self.budget_of(layer) // 2) if self._half else self.recent

    def begin(self, cache, prompt_lens):
        super().begin(cache, prompt_lens)
        tokens = -(-cache.max_tokens // cache.page_size) * cache.page_size
        shape = cache.batch, cache.kv_heads, tokens
        self.weight = [torch.zeros(shape, device=cache.device) for _ in cache.rooms]

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
            self._represent(layer, cache, step.page_table[i, :pages].long(), keys.transpose(0, 1), best.transpose(0, 1))

    def select(self, layer, q, cache, scale):
        step, size, recent = cache.step_of(layer), cache.page_size, self.recent_of(layer)
        # The page that leaves the window at this step; a row has one every `page_size` steps.
        due = [i for i, row in enumerate(step.rows) if cache.lengths[row] > recent]
        due = [i for i in due if (cache.lengths[step.rows[i]] - recent) % size == 0]
        for i in due:
            row = step.rows[i]
            page = (cache.lengths[row] - recent) // size - 1
            best = self._heaviest(self.weight[layer][row, :, page * size : (page + 1) * size])
            physical = step.page_table[i, page : page + 1].long()
            self._represent(layer, cache, physical, cache.k[layer][physical], best[None])
        scores = ops.score_pages(
            q,
            cache.summary[layer],
            step.page_table,
            step.seq_lens,
            size,
            scale=scale,
            summary_mode="representative",
        )
        pages, counts = ops.select_pages(
            scores.sum(1, keepdim=True).expand_as(scores),
            step.seq_lens,
            size,
            self.budget_of(layer),
            sink=self.sink,
            recent=recent,
            protected_lens=self.protected_lens(cache, layer),
        )
        return Selection(pages, counts)

    def observe(self, layer, mass, selection, cache):
        step, size = cache.step_of(layer), cache.page_size
        weight = step.take(self.weight[layer])
        within = torch.arange(size, device=mass.device)
        tokens = (selection.pages[..., None] * size + within).flatten(2).long()  # negative where nothing is listed
        inside = tokens >= (step.seq_lens - self.recent_of(layer))[:, None, None].clamp(min=0)
        weight.scatter_add_(2, tokens.clamp(min=0), grouped(mass, cache.kv_heads).where(inside, mass.new_zeros(())))
        step.put(self.weight[layer], weight)

    def _heaviest(self, weight: torch.Tensor) -> torch.Tensor:
        """``[..., page_size]`` -> ``[..., representatives]``: places of the heaviest, of equals the first."""
        return weight.argsort(dim=-1, descending=True, stable=True)[..., : self.vectors]

    def _represent(self, layer, cache, physical, keys, best) -> None:
        """Let keys ``[pages, kv_heads, page_size, head_dim]`` at the places ``best`` stand for their pages."""
        cache.summary[layer][physical] = keys.gather(2, best[..., None].expand(*best.shape, keys.shape[-1]))

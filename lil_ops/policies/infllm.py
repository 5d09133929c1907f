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
from lil_ops.policies.slots import prompt_mass


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
        shape = cache.batch, cache.kv_heads, tokens
        self.weight = [torch.zeros(shape, device=cache.device) for _ in cache.rooms]

    def keep(self, layer, i, chunk, cache):
        step = cache.step_of(layer)
        row, size, tokens = step.rows[i], cache.page_size, chunk.k.shape[1]
        weight = self.weight[layer][row]
        if step.held[i] == 0:
            weight.zero_()
        weight[:, :tokens] += prompt_mass(chunk, window=self.recent_of(layer))
        # Pages that the next token's window leaves out, as `ops.represent_page` counts them.
        pages = max(0, tokens + 1 - self.recent_of(layer)) // size
        if pages:
            left = weight[:, : pages * size].unflatten(1, (pages, size))
            best = left.topk(self.representatives, sorted=False).indices
            keys = chunk.k[:, : pages * size].unflatten(1, (pages, size))
            keys = keys.gather(2, best[..., None].expand(*best.shape, keys.shape[-1]))
            cache.summary[layer][step.page_table[i, :pages].long()] = keys.mean(2, keepdim=True).transpose(0, 1)

    def select(self, layer, q, cache, scale):
        step = cache.step_of(layer)
        scores = ops.score_pages(
            q,
            cache.summary[layer],
            step.page_table,
            step.seq_lens,
            cache.page_size,
            scale=scale,
            summary_mode="representative",
        )
        return Selection(*self.best_pages(layer, scores.sum(1, keepdim=True).expand_as(scores), cache))

    def observe(self, layer, mass, selection, cache):
        step = cache.step_of(layer)
        weight = step.take(self.weight[layer])
        ops.represent_page(
            cache.summary[layer],
            weight,
            cache.k[layer],
            step.page_table,
            step.seq_lens,
            mass,
            selection.pages,
            selection.counts,
            recent=self.recent_of(layer),
            representatives=self.representatives,
        )
        step.put(self.weight[layer], weight)

"""SnapKV (Li et al., arXiv 2404.14469).

Only the prompt is cut: the last `recent` tokens of it, the observation window, stay, and of the others those to which
the queries of the window gave the most softmax weight, smoothed by a mean over 7 neighbours. What is generated is all
held. Published for one query head a KV head; here (GQA) the weights of a group are summed.
`budget` counts the prompt's tokens that stay, the window included; a prompt in pieces is cut again after each of them.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from lil_ops.cache import Room
from lil_ops.policies.base import Policy
from lil_ops.policies.slots import TokenSlots, prompt_mass


class SnapKV(TokenSlots):
    name = "snapkv"
    rule = "of the prompt, the tokens of the most attention from its end; all that is generated"
    source = "SnapKV, arXiv 2404.14469"
    memory = "grows with the output"
    NEIGHBOURS = 7

    def __init__(self, budget=None, *, recent: int = 32, **options):
        super().__init__(budget, recent=recent, **options)

    def room_of(self, layer):
        return Room(kept=self.budget_of(layer))

    def prompt_priority(self, layer, i, chunk, cache):
        mass = prompt_mass(chunk, queries=self.recent)
        before = max(0, mass.shape[1] - self.recent)
        if before:
            mass[:, :before] = F.avg_pool1d(mass[:, :before], self.NEIGHBOURS, 1, self.NEIGHBOURS // 2)
        return mass

    def write(self, layer, k, v, cache):
        step = cache.step_of(layer)
        held = step.take(self.held[layer])
        last = (step.seq_lens - 1).long()[:, None, None].expand(-1, cache.kv_heads, -1)
        held.scatter_(2, last, (step.positions - 1)[:, None, None].expand_as(last).to(torch.int32))
        step.put(self.held[layer], held)
        return Policy.write(self, layer, k, v, cache)

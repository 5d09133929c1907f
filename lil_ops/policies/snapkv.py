"""SnapKV (Li et al., arXiv 2404.14469).

Only the prompt is cut: the last `recent` tokens of it, the observation window, stay, and of the others those to which
the queries of the window gave the most softmax weight, smoothed by a mean over 7 neighbours. What is generated is all
held. Published for one query head a KV head; here (GQA) the weights of a group are summed.
`budget` counts the prompt's tokens that stay, the window included; a prompt in pieces is cut again after each of them.
"""

from __future__ import annotations

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

    def keep(self, layer, i, chunk, cache):
        kept, row = super().keep(layer, i, chunk, cache), cache.step_of(layer).rows[i]
        self.expect(layer, row, kept.shape[1], cache.lengths[row])
        return kept

    def write(self, layer, k, v, cache):
        return Policy.write(self, layer, k, v, cache)

"""H2O (Zhang et al., arXiv 2306.14048).

A KV head holds its most recent tokens, half the budget, and of the others those that have gathered the most attention:
the sum of their softmax weights over all queries since, those of the prompt included. The one with the least goes.
Published for one query head a KV head; here (GQA) the weights of a group are summed, and its heads share a decision.
"""

from __future__ import annotations

from lil_ops.policies.slots import TokenSlots, prompt_mass


class H2O(TokenSlots):
    name = "h2o"
    rule = "the recent half, and the tokens of the most attention so far"
    source = "H2O, arXiv 2306.14048"
    mass = "token"

    def __init__(self, budget=None, *, recent: int | None = None, **options):
        super().__init__(budget, recent=1 if recent is None else recent, **options)
        self._halves = recent is None

    def recent_of(self, layer):
        return max(1, self.budget_of(layer) // 2) if self._halves else self.recent

    def prompt_priority(self, layer, i, chunk, cache):
        step = cache.step_of(layer)
        mass = prompt_mass(chunk)
        mass[:, : step.held[i]] += self.priority[layer][step.rows[i], :, : step.held[i]]
        return mass

    def observe(self, layer, mass, selection, cache):
        self.fold(layer, mass, cache, rule="sum")

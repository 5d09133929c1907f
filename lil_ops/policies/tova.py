"""TOVA (Oren et al., arXiv 2401.06104).

Of a layer's tokens the one goes that the last query gave the least softmax weight, averaged over all heads; so all
heads of a layer hold the same tokens. Nothing else is kept for its place. A longer prompt is cut to the budget at
once, by the weights of its last query.
"""

from __future__ import annotations

from lil_ops.policies.slots import TokenSlots, prompt_mass


class TOVA(TokenSlots):
    name = "tova"
    rule = "the tokens of the most attention in the last step, one choice a layer"
    source = "TOVA, arXiv 2401.06104"
    mass = "token"

    def prompt_priority(self, layer, i, chunk, cache):
        return prompt_mass(chunk, queries=1).sum(0, keepdim=True).expand(len(chunk.k), -1)

    def observe(self, layer, mass, selection, cache):
        self.fold(layer, mass, cache, rule="last", shared=True)

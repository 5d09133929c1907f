"""Full: every step reads every cached token. The dense baseline."""

from __future__ import annotations

from lil_ops.policies.base import Policy


class Full(Policy):
    name = "full"
    rule = "reads everything"
    source = "dense attention"
    tells_loss = True  # none

    def __init__(self):
        pass

    def reads_all(self, layer):
        return True

    def _set_budgets(self, num_layers, max_tokens):
        pass

    def check_budget(self, cache, prompt_lens):
        pass

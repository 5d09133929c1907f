"""Stop rules for transformers' own generate."""

from __future__ import annotations

import torch
from transformers import StoppingCriteria

from lil_ops.stopping import Lz77Tracker, Progress, StopReason, StopRule


class StopRuleCriteria(StoppingCriteria):
    """A stop rule as a transformers ``StoppingCriteria``, for one call of ``model.generate``::

        criteria = StopRuleCriteria(lil_ops.Guardian(), prompt_length=inputs.input_ids.shape[1])
        model.generate(**inputs, stopping_criteria=[criteria])

    It looks at what was generated behind the first ``prompt_length`` places. Rules that need the information loss are
    for `lil_ops.generate`: ValueError; a second call of ``model.generate`` is one too. max_new_tokens: at least as many
    as will be generated. vocab_size: the model's; what bits are counted with.
    """

    def __init__(
        self, rule: StopRule, prompt_length: int, *, max_new_tokens: int = 1 << 16, vocab_size: int = 2**31 - 1
    ):
        if rule.needs_loss:
            raise ValueError("StopRuleCriteria: a rule that needs the information loss runs in lil_ops.generate only")
        self._rule, self._seen = rule, prompt_length
        self._prompt_length, self._max_new_tokens, self._vocab_size = prompt_length, max_new_tokens, vocab_size
        self._stop: torch.Tensor | None = None

    def __call__(self, input_ids: torch.LongTensor, scores, **kwargs) -> torch.Tensor:
        batch, length = input_ids.shape
        if self._stop is not None and (batch != len(self._stop) or length <= self._seen):
            raise ValueError("StopRuleCriteria: expected to be used for one call of generate, got another")
        if self._stop is None:
            self._tracker = Lz77Tracker(batch, self._max_new_tokens, self._vocab_size)
            self._state = self._rule.start(batch)
            self._stop = torch.zeros(batch, dtype=torch.int32)
        active = torch.ones(batch, dtype=torch.bool)
        for place in range(self._seen, length):
            newest = input_ids[:, place].cpu()
            phrases, bits = self._tracker.append(newest[:, None])
            count = torch.full((batch,), place + 1 - self._prompt_length, dtype=torch.int32)
            self._state.check(Progress(newest, phrases, bits, count, active, None, self._stop))
        self._seen = length
        return (self._stop != StopReason.RUNNING).to(input_ids.device)

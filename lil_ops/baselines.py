"""Stop rules to compare `Guardian` with: exact repetition, and a fixed number of tokens."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from lil_ops.checks import INT32_MAX, is_whole
from lil_ops.stopping import Progress, StopReason, StopRule


@dataclass(frozen=True)
class Repetition(StopRule):
    """The output ends in some pattern of ``min_pattern`` to ``max_pattern`` tokens, ``count`` times in a row.

    What vLLM's ``repetition_detection`` looks for. Near repetition, or a loop with a counter in it, is none.
    """

    max_pattern: int = 64
    min_pattern: int = 1
    count: int = 4

    def __post_init__(self):
        for option, least in (("min_pattern", 1), ("max_pattern", self.min_pattern), ("count", 2)):
            value = getattr(self, option)
            if not is_whole(value, least, INT32_MAX):
                expected = f"a whole number from {least} to 2**31 - 1"
                raise ValueError(f"Repetition: {option}: expected {expected}, got {value!r}")

    def start(self, batch: int, device: torch.device | str = "cpu") -> RepetitionState:
        return RepetitionState(self, batch, device)


class RepetitionState:
    """State: ``last [batch, max_pattern]``, the newest tokens, newest first; ``run [batch, patterns]``, for how many
    tokens each has equalled the one a pattern's length before it. So a check costs no look back."""

    def __init__(self, rule: Repetition, batch: int, device: torch.device | str):
        self.gain = torch.full((batch,), -1, dtype=torch.int32, device=device)
        self._lag = torch.arange(rule.min_pattern, rule.max_pattern + 1, device=device)
        self._needed = self._lag * (rule.count - 1)
        self.last = torch.full((batch, rule.max_pattern), -1, device=device)
        self.run = torch.zeros(batch, len(self._lag), dtype=torch.int64, device=device)

    def check(self, now: Progress) -> None:
        token, active = now.tokens[:, None], now.active[:, None]
        run = (self.run + 1) * (self.last[:, self._lag - 1] == token)
        torch.where(active, run, self.run, out=self.run)
        self.last.copy_(torch.where(active, torch.cat([token, self.last[:, :-1]], 1), self.last))
        fired = (self.run >= self._needed).any(1) & (now.stop == StopReason.RUNNING)
        now.stop.masked_fill_(fired, StopReason.GUARDIAN)

    def reset(self, row: int) -> None:
        self.last[row] = -1
        self.run[row] = 0


@dataclass(frozen=True)
class TokenBudget(StopRule):
    """The output has ``tokens`` tokens."""

    tokens: int = 1024

    def __post_init__(self):
        if not is_whole(self.tokens, 1, INT32_MAX):
            raise ValueError(f"TokenBudget: tokens: expected a whole number from 1 to 2**31 - 1, got {self.tokens!r}")

    def start(self, batch: int, device: torch.device | str = "cpu") -> TokenBudgetState:
        return TokenBudgetState(self, batch, device)


class TokenBudgetState:
    def __init__(self, rule: TokenBudget, batch: int, device: torch.device | str):
        self.gain = torch.full((batch,), -1, dtype=torch.int32, device=device)
        self._tokens = rule.tokens

    def check(self, now: Progress) -> None:
        fired = (now.num_tokens >= self._tokens) & (now.stop == StopReason.RUNNING)
        now.stop.masked_fill_(fired, StopReason.GUARDIAN)

    def reset(self, row: int) -> None:
        pass

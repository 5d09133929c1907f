"""What stop rules have in common: what they see of a batch after each step, and what they remember of it.

A rule's state lives in preallocated tensors on the device it was started for, and a check waits for nothing.
"""

from __future__ import annotations

import operator
from abc import ABC, abstractmethod
from collections.abc import Iterable
from enum import IntEnum
from typing import NamedTuple, Protocol

import torch

from lil_ops import ops


class StopReason(IntEnum):
    """Codes of the ``stop`` tensor, one a sequence; csrc/params.h has the same. GUARDIAN: a stop rule, whichever."""

    RUNNING = 0
    EOS = 1
    LENGTH = 2
    GUARDIAN = 3


class Progress(NamedTuple):
    """A batch after a step. All ``[batch]``; means nothing for a sequence that has stopped.

    tokens: int64, the newest one of each. phrases, bits: int32, the LZ77 size of what was generated. num_tokens: int32.
    active: bool, whether the sequence took a token in this step. lost_bits: float32, what attention lost in it (see
    `LilCache`); None where nothing tells. stop: int32 `StopReason` codes; a sequence that has stopped keeps its own.
    """

    tokens: torch.Tensor
    phrases: torch.Tensor
    bits: torch.Tensor
    num_tokens: torch.Tensor
    active: torch.Tensor
    lost_bits: torch.Tensor | None
    stop: torch.Tensor


class StopState(Protocol):
    """What a rule remembers of a running batch.

    ``gain`` ``[batch]`` int32: what the last full interval of each sequence added, -1 before there was one, or in rules
    without intervals.
    """

    gain: torch.Tensor

    def check(self, now: Progress) -> None:
        """Look at the batch after a step; write the code of each running sequence that is to end into ``now.stop``."""

    def reset(self, row: int) -> None:
        """Another sequence begins in this place of the batch."""


class StopRule(ABC):
    """A rule as its user writes it: options only, good for any number of batches.

    ``needs_loss``: whether it reads ``lost_bits``. ``interval``: tokens between its checks.
    """

    needs_loss: bool = False
    interval: int = 1

    @abstractmethod
    def start(self, batch: int, device: torch.device | str = "cpu") -> StopState:
        """Allocate what the rule needs to watch ``batch`` new sequences."""

    def feed(self, tokens: Iterable[int], vocab_size: int = 2**31 - 1) -> Watch:
        """Watch one stream of tokens, this beginning of it first. See `Watch`."""
        return Watch(self, vocab_size).feed(tokens)


class Watch:
    """A rule on one stream of tokens, without a model: nothing is lost.

    ``stopped_at``: the tokens after which the rule ended it, or None; what is fed behind them is not looked at.
    ``num_tokens``, ``phrases``, ``bits``: of what was looked at. ``gains``: of each interval, in order.
    """

    def __init__(self, rule: StopRule, vocab_size: int = 2**31 - 1):
        self._state, self._tracker = rule.start(1), Lz77Tracker(1, 1 << 10, vocab_size)
        self._stop = torch.zeros(1, dtype=torch.int32)
        self._interval = rule.interval
        self._seen: list[int] = []
        self.stopped_at: int | None = None
        self.phrases = self.bits = 0
        self.gains: list[int] = []

    @property
    def num_tokens(self) -> int:
        return len(self._seen)

    def feed(self, tokens: Iterable[int]) -> Watch:
        """Look at more of the stream. Returns itself."""
        for token in tokens:
            if self.stopped_at is not None:
                break
            self._add(operator.index(token))
        return self

    def _add(self, token: int) -> None:
        self._grow()
        newest = torch.tensor([token])
        phrases, bits = self._tracker.append(newest[None])
        self._seen.append(token)
        count = torch.tensor([len(self._seen)], dtype=torch.int32)
        active = torch.ones(1, dtype=torch.bool)
        self._state.check(Progress(newest, phrases, bits, count, active, torch.zeros(1), self._stop))
        self.phrases, self.bits = int(phrases), int(bits)
        if len(self._seen) % self._interval == 0 and self._state.gain >= 0:
            self.gains.append(int(self._state.gain))
        if self._stop:
            self.stopped_at = len(self._seen)

    def _grow(self) -> None:
        """A parse has a fixed capacity: a full one is made anew, twice as long."""
        if len(self._seen) == self._tracker.max_tokens:
            self._tracker = Lz77Tracker(1, 2 * len(self._seen), self._tracker.vocab_size)
            self._tracker.append(torch.tensor(self._seen)[None])


class Lz77Tracker:
    """The LZ77 parse of each sequence of a batch, up to ``max_tokens`` tokens with ids below ``vocab_size``."""

    def __init__(self, batch: int, max_tokens: int, vocab_size: int, device: torch.device | str = "cpu"):
        self.max_tokens, self.vocab_size = max_tokens, vocab_size
        self.state = ops.lz77_state(batch, max_tokens, device)

    def append(self, tokens: torch.Tensor, counts: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """Feed ``tokens`` ``[batch, T]``, the first ``counts[b]`` of each row; the (phrases, bits) of all so far."""
        return ops.lz77_append(self.state, tokens, counts, self.vocab_size)

    def reset(self, row: int) -> None:
        """Another sequence begins in this place of the batch."""
        self.state[row].zero_()

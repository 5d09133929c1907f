"""The early stop: watch how much new information the generated tokens carry, and stop when it runs out.

`Guardian` is the published rule (Hu et al., arXiv 2601.03043). `StopRule` and `StopState` are the interface under it,
for other rules. State lives in preallocated tensors on the device it was started for, and a check waits for nothing.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import IntEnum
from typing import Protocol

import torch

from lil_ops import ops

UNITS = ("phrases", "bits")


class StopReason(IntEnum):
    """Codes of the ``stop`` tensor, one a sequence; csrc/params.h has the same."""

    RUNNING = 0
    EOS = 1
    LENGTH = 2
    GUARDIAN = 3


class StopState(Protocol):
    """What a rule remembers of a running batch.

    ``gain`` ``[batch]`` int32: what the last full interval of each sequence added, -1 before there was one.
    """

    gain: torch.Tensor

    def check(self, phrases: torch.Tensor, bits: torch.Tensor, num_tokens: torch.Tensor, stop: torch.Tensor) -> None:
        """Look at the batch after a step, and write the stop code of each running sequence that is to end.

        All ``[batch]`` int32: ``phrases``, ``bits`` the sizes and ``num_tokens`` the count of the tokens generated,
        which means nothing for a sequence that has stopped; ``stop`` the `StopReason` codes, in which such a sequence
        keeps its reason.
        """


class StopRule(Protocol):
    """A rule as its user writes it: options only, good for any number of batches."""

    def start(self, batch: int, device: torch.device | str) -> StopState:
        """Allocate what the rule needs to watch ``batch`` new sequences."""


@dataclass(frozen=True)
class Guardian:
    """Every ``interval`` tokens, compare the size with the one at the last check; growth below ``threshold`` ends the
    sequence.

    Args:
        interval: tokens between checks, at least 1 (the paper's f).
        threshold: growth that an interval must reach, in ``unit`` (the paper's t; it reports t / f = 0.08 in phrases).
        unit: ``"phrases"``, or ``"bits"``, which needs a threshold of its own.
    """

    interval: int = 250
    threshold: float = 20
    unit: str = "phrases"

    def __post_init__(self):
        if not isinstance(self.interval, int) or isinstance(self.interval, bool) or not 1 <= self.interval < 2**31:
            raise ValueError(f"Guardian: interval: expected a whole number of tokens, 1 or more, got {self.interval!r}")
        if not isinstance(self.threshold, (int, float)) or not (math.isfinite(self.threshold) and self.threshold >= 0):
            raise ValueError(f"Guardian: threshold: expected a finite number, 0 or more, got {self.threshold!r}")
        if self.unit not in UNITS:
            raise ValueError(f"Guardian: unit: expected one of {', '.join(UNITS)}, got {self.unit!r}")

    def start(self, batch: int, device: torch.device | str = "cpu") -> GuardianState:
        return GuardianState(self, batch, device)


class GuardianState:
    """`Guardian` at work on one batch.

    ``interval`` int32 and ``threshold`` float32, both ``[batch]``, may be changed for single sequences while it runs;
    an interval of 0 turns the rule off for one. ``checkpoint`` ``[batch, 2]`` int32: tokens and size at the last check.
    """

    def __init__(self, guardian: Guardian, batch: int, device: torch.device | str):
        def filled(value: float, dtype: torch.dtype = torch.int32) -> torch.Tensor:
            return torch.full((batch,), value, dtype=dtype, device=device)

        self.unit = guardian.unit
        self.interval = filled(guardian.interval)
        self.threshold = filled(guardian.threshold, torch.float32)
        self.checkpoint = torch.zeros(batch, 2, dtype=torch.int32, device=device)
        self.gain = filled(-1)

    def check(self, phrases: torch.Tensor, bits: torch.Tensor, num_tokens: torch.Tensor, stop: torch.Tensor) -> None:
        sizes = phrases if self.unit == "phrases" else bits
        ops.guardian_check(sizes, num_tokens, self.interval, self.threshold, self.checkpoint, self.gain, stop)


class Lz77Tracker:
    """The LZ77 parse of each sequence of a batch, up to ``max_tokens`` tokens with ids below ``vocab_size``."""

    def __init__(self, batch: int, max_tokens: int, vocab_size: int, device: torch.device | str = "cpu"):
        self.vocab_size = vocab_size
        self.state = ops.lz77_state(batch, max_tokens, device)

    def append(self, tokens: torch.Tensor, counts: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """Feed ``tokens`` ``[batch, T]``, the first ``counts[b]`` of each row; the (phrases, bits) of all so far."""
        return ops.lz77_append(self.state, tokens, counts, self.vocab_size)

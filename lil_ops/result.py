"""What a generation gives back: one event a step while it runs, one result when it ends."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from lil_ops.actions import ActionEvent
from lil_ops.stopping import StopReason


@dataclass(frozen=True)
class StepEvent:
    """One step of the loop. Dictionaries have the rows (places in the batch) that were running when it began.

    step: 0 for the prefill. tokens: the id each row produced. stop: the rows that this step ended, and why. seconds:
    the step's duration (TTFT for step 0, then TBT). phrases: LZ77 size of the row's output. gain: what its last full
    Guardian interval added, in the Guardian's unit (empty without a Guardian). kv_bytes: cache bytes in use after the
    step.
    """

    step: int
    tokens: dict[int, int]
    stop: dict[int, StopReason]
    seconds: float
    phrases: dict[int, int]
    gain: dict[int, int]
    kv_bytes: int


@dataclass(frozen=True, eq=False)
class GenerationResult:
    """The output of a batch. Lists have one entry a sequence, in the order of the input. Equal to itself alone.

    tokens: the new ids, an end-of-sequence token included. stop_reason: `StopReason.RUNNING` where interrupted.
    step_times: seconds of each step, the prefill first. kv_bytes_peak: the most cache bytes in use at a time.
    lz77: the LZ77 curve: element i of an int array is the size in phrases of the first i + 1 new tokens.
    events: what a stop rule's action did, and when.
    lost_bits: what attention lost in a step, on average (see `LilCache`); None where nobody asked for it.
    kv_bytes: cache bytes of each sequence at its end. It gives none back before, so this is its peak.
    """

    tokens: list[list[int]]
    stop_reason: list[StopReason]
    step_times: list[float]
    kv_bytes_peak: int
    lz77: list[np.ndarray]
    events: list[list[ActionEvent]] = field(default_factory=list)
    kv_bytes: list[int] = field(default_factory=list)
    lost_bits: list[float] | None = None

    @property
    def ttft(self) -> float:
        """Time to first token in seconds: the prefill of the whole batch; 0 where nothing ran."""
        return self.step_times[0] if self.step_times else 0.0

    @property
    def tbt(self) -> float:
        """Mean time between tokens in seconds, over the steps after the first token; 0 where there were none."""
        return sum(self.step_times[1:]) / max(len(self.step_times) - 1, 1)

    @property
    def jct(self) -> float:
        """Job completion time in seconds: the sum of the steps. What a caller does between steps is not in it."""
        return sum(self.step_times)

    @property
    def phrases(self) -> list[int]:
        """LZ77 size of each output in phrases."""
        return [int(curve[-1]) if len(curve) else 0 for curve in self.lz77]

    @property
    def ratio(self) -> list[float]:
        """LZ77 phrases a token of each output; 0 for an empty one."""
        return [phrases / max(len(tokens), 1) for phrases, tokens in zip(self.phrases, self.tokens, strict=True)]

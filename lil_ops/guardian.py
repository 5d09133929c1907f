"""Guardian, the published early stop (Hu et al., arXiv 2601.03043): watch how much new information the generated tokens
carry, and stop when it runs out."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from lil_ops import ops
from lil_ops.checks import INT32_MAX, is_whole
from lil_ops.stopping import Progress, StopRule

UNITS = ("phrases", "bits")


@dataclass(frozen=True)
class Guardian(StopRule):
    """Every ``interval`` tokens, compare the size with the one at the last check; growth below ``threshold`` ends the
    sequence.

    Args:
        interval: tokens between checks, at least 1 (the paper's f).
        threshold: growth that an interval must reach, in ``unit`` (the paper's t; it reports t / f = 0.08 in phrases).
        unit: ``"phrases"``, or ``"bits"``, which needs a threshold of its own.
        loss_aware: weigh what sparse attention lost in the interval against what the output gained. Each step's lost
            bits, times ``loss_weight``, are taken from the size: in bits as they are, in phrases at the price that the
            output's phrases have had so far. Where nothing is lost it is the published rule. It needs a policy that
            tells its loss (`lil_ops.policies.Policy.tells_loss`); one given by name, quest, then has other defaults,
            ``scoring="meanstd"`` and ``sink=1``, because the bound of minmax scores is too far from the truth.
    """

    interval: int = 250
    threshold: float = 20
    unit: str = "phrases"
    loss_aware: bool = False
    loss_weight: float = 1.0

    def __post_init__(self):
        if not is_whole(self.interval, 1, INT32_MAX):
            raise ValueError(f"Guardian: interval: expected a whole number from 1 to 2**31 - 1, got {self.interval!r}")
        for option in ("threshold", "loss_weight"):
            value = getattr(self, option)
            if not isinstance(value, (int, float)) or not 0 <= value <= torch.finfo(torch.float32).max:
                raise ValueError(f"Guardian: {option}: expected a number, 0 or more, that float32 has, got {value!r}")
        if self.unit not in UNITS:
            raise ValueError(f"Guardian: unit: expected one of {', '.join(UNITS)}, got {self.unit!r}")

    @property
    def needs_loss(self) -> bool:
        return self.loss_aware

    def start(self, batch: int, device: torch.device | str = "cpu") -> GuardianState:
        return GuardianState(self, batch, device)


class GuardianState:
    """`Guardian` at work on one batch.

    ``interval`` int32 and ``threshold`` float32, both ``[batch]``, may be changed for single sequences while it runs;
    an interval of 0 turns the rule off for one. ``checkpoint`` ``[batch, 2]`` int32: tokens and size at the last check.
    ``lost`` ``[batch]`` float32: what was lost so far, in the unit and weighted.
    """

    def __init__(self, guardian: Guardian, batch: int, device: torch.device | str):
        def filled(value: float, dtype: torch.dtype = torch.int32) -> torch.Tensor:
            return torch.full((batch,), value, dtype=dtype, device=device)

        self._options = guardian
        self.interval = filled(guardian.interval)
        self.threshold = filled(guardian.threshold, torch.float32)
        self.checkpoint = torch.zeros(batch, 2, dtype=torch.int32, device=device)
        self.gain = filled(-1)
        self.lost = filled(0, torch.float32)

    def check(self, now: Progress) -> None:
        sizes = now.phrases if self._options.unit == "phrases" else now.bits
        if self._options.loss_aware:
            lost = now.lost_bits * self._options.loss_weight
            self.lost += lost * now.phrases / now.bits.clamp(min=1) if self._options.unit == "phrases" else lost
            sizes = (sizes - self.lost).floor().to(torch.int32)
        ops.guardian_check(sizes, now.num_tokens, self.interval, self.threshold, self.checkpoint, self.gain, now.stop)

    def reset(self, row: int) -> None:
        self.interval[row] = self._options.interval
        self.threshold[row] = self._options.threshold
        self.checkpoint[row] = 0
        self.gain[row] = -1
        self.lost[row] = 0

"""Stop rules applied to what was recorded without one: what each would have saved, and what it would have cost.

A rule looks at nothing but the tokens so far, so a sequence under it is the recorded one up to the stop. The replay
feeds the recorded sizes to the rule itself, in the order of `DecodeLoop`: end of sequence, rule, length. An answer
counts if the text up to the stop gives it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch

from lil_ops.evaluation.answers import Checker, checker
from lil_ops.evaluation.records import Run
from lil_ops.evaluation.statistics import Estimate, mean, ratio
from lil_ops.stopping import Progress, StopReason, StopRule


@dataclass(frozen=True)
class Output:
    """A recorded output. ``phrases`` and ``bits``: its size after each token."""

    record: dict
    phrases: np.ndarray
    bits: np.ndarray
    checker: Checker
    # By tokens: many rules stop at the same place, and mathematics takes its time.
    _correct: dict[int, bool] = field(default_factory=dict)

    def __post_init__(self):
        self._correct[len(self)] = self.record["correct"]

    def __len__(self) -> int:
        return len(self.record["tokens"])

    def correct_at(self, tokens: int) -> bool:
        """Whether the first so many tokens give the right answer."""
        if tokens not in self._correct:
            text = self.record["text"][: sum(self.record["lengths"][:tokens])]
            self._correct[tokens] = self.checker.check(text, self.record["gold"])[1]
        return self._correct[tokens]


def outputs(run: Run) -> dict[str, Output]:
    """A run's outputs by problem. Raises ValueError for a run with a stop rule: what it cut off is not there."""
    if run.stop != "off":
        raise ValueError(f"{run.path}: recorded with stop rule {run.stop}; a replay needs a run with --stop off")
    by = checker(run.settings["answer_by"])
    return {
        id: Output(record, run.curve(id, "phrases"), run.curve(id, "bits"), by) for id, record in run.records.items()
    }


class Stop(NamedTuple):
    """How many tokens a rule leaves of an output, and whether it ended it: it may fire at the very last one."""

    tokens: int
    fired: bool


def stops_at(rule: StopRule, outputs: Sequence[Output]) -> list[Stop]:
    """Where each output ends under the rule. Raises ValueError for a rule that needs what is not recorded."""
    if rule.needs_loss:
        raise ValueError("replay: the rule needs the information loss of each step, which is not recorded")
    if not outputs:
        return []
    lengths = torch.tensor([len(output) for output in outputs])
    ended = torch.tensor([output.record["stop"] == "eos" for output in outputs])
    longest = int(lengths.max())

    def padded(columns: list, dtype: torch.dtype) -> torch.Tensor:
        """``[tokens, outputs]``; what is past an output's end is never looked at."""
        table = torch.zeros(longest, len(columns), dtype=dtype)
        for i, column in enumerate(columns):
            table[: len(column), i] = torch.as_tensor(column, dtype=dtype)
        return table

    tokens = padded([output.record["tokens"] for output in outputs], torch.int64)
    phrases = padded([output.phrases for output in outputs], torch.int32)
    bits = padded([output.bits for output in outputs], torch.int32)
    state = rule.start(len(outputs), "cpu")
    stop = torch.zeros(len(outputs), dtype=torch.int32)
    num_tokens = torch.zeros(len(outputs), dtype=torch.int32)
    at, fired = lengths.clone(), torch.zeros(len(outputs), dtype=torch.bool)
    for step in range(longest):
        active = stop == StopReason.RUNNING
        last = (lengths == step + 1) & active
        stop.masked_fill_(last & ended, StopReason.EOS)
        before = stop.clone()
        sizes = tokens[step], phrases[step], bits[step], num_tokens.fill_(step + 1)
        state.check(Progress(*sizes, active, None, stop))
        at[stop != before] = step + 1
        fired |= stop != before
        stop.masked_fill_(last & (stop == StopReason.RUNNING), StopReason.LENGTH)
    return list(map(Stop, at.tolist(), fired.tolist()))


@dataclass(frozen=True)
class Effect:
    """Of a rule on recorded outputs. saved: share of the tokens. stopped: share of the outputs that it ended. before,
    after: accuracy; difference: after - before. lost: right answers that came after the stop."""

    saved: Estimate
    stopped: Estimate
    before: Estimate
    after: Estimate
    difference: Estimate
    lost: int


def effect(runs: Sequence[dict[str, Output]], stops: Sequence[dict[str, Stop]]) -> Effect:
    """The effect of a rule on one run, or on several together, from where each output ends under it.

    Several runs count by problem, over the problems that all of them have, so that an interval is over problems.
    """
    ids = [id for id in runs[0] if all(id in run for run in runs)]

    def table(value) -> np.ndarray:
        """``[runs, problems]``."""
        values = [[value(run[id], stop[id]) for id in ids] for run, stop in zip(runs, stops, strict=True)]
        return np.array(values, dtype=float).reshape(len(runs), len(ids))

    lengths, at = table(lambda output, stop: len(output)), table(lambda output, stop: stop.tokens)
    fired = table(lambda output, stop: stop.fired)
    before = table(lambda output, stop: output.record["correct"])
    after = table(lambda output, stop: output.correct_at(stop.tokens))
    return Effect(
        saved=ratio((lengths - at).sum(0), lengths.sum(0)),
        stopped=mean(fired.mean(0)),
        before=mean(before.mean(0)),
        after=mean(after.mean(0)),
        difference=mean((after - before).mean(0)),
        lost=int((before > after).sum()),
    )


def replay(rule: StopRule, runs: Sequence[dict[str, Output]]) -> list[dict[str, Stop]]:
    """Where each output ends under the rule. All at once: a step costs little more for many than for one."""
    at = iter(stops_at(rule, [output for run in runs for output in run.values()]))
    return [{id: next(at) for id in run} for run in runs]

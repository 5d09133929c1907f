"""Runs one combination over the problems, batch by batch.

Batches are consecutive problems, the same in every start of a run. So a run that was killed and goes on has the very
batches that it would have had, and with them the rounding of its matrix products and the load that its times are of.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from lil_ops.actions import ActionEvent, Answer
from lil_ops.decode import DecodeLoop
from lil_ops.engine import Engine, Request
from lil_ops.evaluation import stops
from lil_ops.evaluation.answers import Checker
from lil_ops.evaluation.data import Problem
from lil_ops.evaluation.grid import Combination
from lil_ops.evaluation.records import Writer
from lil_ops.policies import POLICIES
from lil_ops.stopping import StopReason
from lil_ops.text import Detokenizer

# Called after a step: sequences that ran in it, those of them that ended, tokens so far, seconds.
OnStep = Callable[[int, int, int, float], object]


class Outcome(NamedTuple):
    """What became of one problem; the times are of `lil_ops.evaluation.records.RECORD`."""

    tokens: list[int]
    stop: StopReason
    kv_bytes: int
    phrases: int
    lost_bits: float | None
    events: list[ActionEvent]
    ttft: float
    tbt: float
    jct: float


@dataclass(frozen=True)
class Runner:
    """A model with its problems. ``prompts``: the ids of each. ``loop_options``: those of `DecodeLoop` that all
    combinations share, without the seed. engine: serve a batch by `Engine`, in which a sequence takes the pages of its
    whole length at once. measure_loss: of the policies that tell their loss."""

    model: object
    tokenizer: object
    problems: Sequence[Problem]
    prompts: Sequence[list[int]]
    checker: Checker
    loop_options: dict
    seed: int
    batch: int
    answer: Answer | None = None  # what stop rules bring about that answer
    engine: bool = False
    measure_loss: bool = False

    def check(self, combination: Combination) -> None:
        """Raise ValueError where some batch cannot be run: the longest prompt needs most, and a budget that is a share
        is smallest in the batch whose longest is the shortest."""
        longest = [max(batch, key=lambda i: len(self.prompts[i])) for batch in self.pending(())]
        longest.sort(key=lambda i: len(self.prompts[i]))
        for i in dict.fromkeys((longest[-1], longest[0])):
            if self.engine:
                cache = self._engine(combination, [i]).cache
                cache.policy.check_budget(cache.kv, [len(self.prompts[i])])
            else:
                self._loop(combination, [i])

    def pending(self, done: Sequence[str]) -> list[list[int]]:
        """The batches, as places in the list of problems, of which a record is missing."""
        places = range(len(self.problems))
        batches = [list(places[start : start + self.batch]) for start in places[:: self.batch]]
        return [batch for batch in batches if any(self.problems[i].id not in done for i in batch)]

    def run(
        self, combination: Combination, writer: Writer, on_step: OnStep = lambda *facts: None
    ) -> Iterator[list[dict]]:
        """Decode what is missing and write it; gives each batch's new records once they are on the disk."""
        done = writer.run.records
        batches, decode = self.pending(done), self._serve if self.engine else self._decode
        if batches and not self.engine:
            self._warm_up(combination, batches[0][0])
        for batch in batches:
            try:
                outcomes = decode(combination, batch, on_step)
            except torch.OutOfMemoryError as error:
                raise ValueError(f"{combination.name}: no memory for {len(batch)} problems at once: {error}") from error
            # Where single lines were damaged, the rest of the batch ran to give them the company they had.
            records = [
                self.record(i, outcome)
                for i, outcome in zip(batch, outcomes, strict=True)
                if self.problems[i].id not in done
            ]
            writer.append(records)
            yield records

    def record(self, i: int, outcome: Outcome) -> dict:
        """The line of problem ``i``; `lil_ops.evaluation.records.RECORD` says what is in it."""
        problem, detokenizer = self.problems[i], Detokenizer(self.tokenizer)
        pieces = [detokenizer.push(token) for token in outcome.tokens]
        pieces[-1] += detokenizer.rest()
        text = "".join(pieces)
        answer, correct = self.checker.check(text, problem.answer)
        return {
            "id": problem.id,
            "gold": problem.answer,
            "answer": answer,
            "correct": correct,
            "stop": outcome.stop.name.lower(),
            "prompt_tokens": len(self.prompts[i]),
            "ttft_s": outcome.ttft,
            "tbt_s": outcome.tbt,
            "jct_s": outcome.jct,
            "kv_bytes": outcome.kv_bytes,
            "phrases": outcome.phrases,
            "lost_bits": outcome.lost_bits,
            "events": [list(event) for event in outcome.events],
            "text": text,
            "lengths": [len(piece) for piece in pieces],
            "tokens": outcome.tokens,
        }

    def _decode(self, combination: Combination, batch: list[int], on_step: OnStep) -> list[Outcome]:
        with self._loop(combination, batch) as loop:
            for event in loop:
                on_step(len(event.tokens), len(event.stop), event.step + 1, event.seconds)
        result, outcomes = loop.result(), []
        for row, tokens in enumerate(result.tokens):
            # The batch goes on after a row has stopped; its own time ends with its last token.
            times = result.step_times[: len(tokens)]
            outcomes.append(
                Outcome(
                    tokens,
                    result.stop_reason[row],
                    result.kv_bytes[row],
                    result.phrases[row],
                    result.lost_bits[row] if result.lost_bits else None,
                    result.events[row],
                    ttft=times[0],
                    tbt=sum(times[1:]) / max(len(times) - 1, 1),
                    jct=sum(times),
                )
            )
        return outcomes

    def _serve(self, combination: Combination, batch: list[int], on_step: OnStep) -> list[Outcome]:
        requests = [
            Request(self.prompts[i], self.loop_options["max_new_tokens"], seed_of(self.seed, self.problems[i].id))
            for i in batch
        ]
        outcomes, steps = {}, 0
        with self._engine(combination, batch) as engine:
            # Nobody sees this token; the step behind it is captured.
            list(engine.run([Request(self.prompts[batch[0]], 1)]))
            start = time.perf_counter()
            for request in requests:
                engine.add(request)
            engine.synchronize()
            first = now = time.perf_counter()
            while engine.free_slots < len(batch):
                running, before = len(batch) - engine.free_slots, now
                engine.step()
                completions, now, steps = engine.completed(), time.perf_counter(), steps + 1
                for done in completions:
                    steps_of_it = len(done.tokens) - 1
                    decode = now - first if steps_of_it else 0.0  # its end is known a step later than it came
                    outcomes[id(done.request)] = Outcome(
                        done.tokens, done.stop_reason, done.kv_bytes, done.phrases, done.lost_bits, done.events,
                        ttft=first - start, tbt=decode / max(steps_of_it, 1), jct=first - start + decode,
                    )  # fmt: skip
                on_step(running, len(completions), steps + 1, now - before)
        return [outcomes[id(request)] for request in requests]

    def _warm_up(self, combination: Combination, i: int) -> None:
        """Two tokens that nobody sees: what happens once (thread pools, code paged in) is in no problem's TTFT."""
        with self._loop(combination, [i]) as loop:
            for event in loop:
                if event.step:
                    break

    def _engine(self, combination: Combination, batch: list[int]) -> Engine:
        options = dict(self.loop_options)
        max_tokens = max(len(self.prompts[i]) for i in batch) + options.pop("max_new_tokens")
        return Engine(self.model, slots=len(batch), max_tokens=max_tokens, **self._options_of(combination), **options)

    def _loop(self, combination: Combination, batch: list[int]) -> DecodeLoop:
        try:
            return DecodeLoop(
                self.model,
                [self.prompts[i] for i in batch],
                # By problem: draws depend neither on the batch nor on the order of the problems.
                seed=[seed_of(self.seed, self.problems[i].id) for i in batch],
                **self._options_of(combination),
                **self.loop_options,
            )
        # torch's allocators raise nothing more specific.
        except RuntimeError as error:
            raise ValueError(f"{combination.name}: no memory for {len(batch)} problems at once: {error}") from error

    def _options_of(self, combination: Combination) -> dict:
        """What a combination asks of either loop."""
        return {
            "policy": combination.policy,
            "guardian": stops.parse(combination.stop),
            "action": stops.action(combination.stop, self.answer),
            "measure_loss": self.measure_loss and POLICIES[combination.policy].tells_loss,
            **combination.policy_options,
        }


def seed_of(seed: int, id: str) -> int:
    """A problem's own seed, the same on every machine."""
    return int.from_bytes(hashlib.sha256(f"{seed} {id}".encode()).digest()[:4], "big")

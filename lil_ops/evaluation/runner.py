"""Runs one combination over the problems, batch by batch.

Batches are consecutive problems, the same in every start of a run. So a run that was killed and goes on has the very
batches that it would have had, and with them the rounding of its matrix products and the load that its times are of.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch

from lil_ops.actions import Answer
from lil_ops.decode import DecodeLoop
from lil_ops.evaluation import stops
from lil_ops.evaluation.answers import Checker
from lil_ops.evaluation.data import Problem
from lil_ops.evaluation.grid import Combination
from lil_ops.evaluation.records import Writer
from lil_ops.result import GenerationResult, StepEvent
from lil_ops.text import Detokenizer


@dataclass(frozen=True)
class Runner:
    """A model with its problems. ``prompts``: the ids of each. ``loop_options``: those of `DecodeLoop` that all
    combinations share, without the seed."""

    model: object
    tokenizer: object
    problems: Sequence[Problem]
    prompts: Sequence[list[int]]
    checker: Checker
    loop_options: dict
    seed: int
    batch: int
    answer: Answer | None = None  # what stop rules bring about that answer

    def check(self, combination: Combination) -> None:
        """Raise ValueError where the longest prompt, and so some batch, cannot be run."""
        self._loop(combination, [max(range(len(self.prompts)), key=lambda i: len(self.prompts[i]))])

    def pending(self, done: Sequence[str]) -> list[list[int]]:
        """The batches, as places in the list of problems, of which a record is missing."""
        places = range(len(self.problems))
        batches = [list(places[start : start + self.batch]) for start in places[:: self.batch]]
        return [batch for batch in batches if any(self.problems[i].id not in done for i in batch)]

    def run(
        self, combination: Combination, writer: Writer, on_step: Callable[[StepEvent], object] = lambda event: None
    ) -> Iterator[list[dict]]:
        """Decode what is missing and write it; gives each batch's new records once they are on the disk."""
        done = writer.run.records
        batches = self.pending(done)
        if batches:
            self._warm_up(combination, batches[0][0])
        for batch in batches:
            try:
                with self._loop(combination, batch) as loop:
                    for event in loop:
                        on_step(event)
            except torch.OutOfMemoryError as error:
                raise ValueError(f"{combination.name}: no memory for {len(batch)} problems at once: {error}") from error
            result = loop.result()
            # Where single lines were damaged, the rest of the batch ran to give them the company they had.
            records = [self.record(i, result, row) for row, i in enumerate(batch) if self.problems[i].id not in done]
            writer.append(records)
            yield records

    def record(self, i: int, result: GenerationResult, row: int) -> dict:
        """The line of problem ``i``; `lil_ops.evaluation.records.RECORD` says what is in it."""
        problem, tokens = self.problems[i], result.tokens[row]
        detokenizer = Detokenizer(self.tokenizer)
        pieces = [detokenizer.push(token) for token in tokens]
        pieces[-1] += detokenizer.rest()
        text = "".join(pieces)
        answer, correct = self.checker.check(text, problem.answer)
        # The batch goes on after a row has stopped; its own time ends with its last token.
        times = result.step_times[: len(tokens)]
        return {
            "id": problem.id,
            "gold": problem.answer,
            "answer": answer,
            "correct": correct,
            "stop": result.stop_reason[row].name.lower(),
            "prompt_tokens": len(self.prompts[i]),
            "ttft_s": times[0],
            "tbt_s": sum(times[1:]) / max(len(times) - 1, 1),
            "jct_s": sum(times),
            "kv_bytes": result.kv_bytes[row],
            "phrases": result.phrases[row],
            "lost_bits": result.lost_bits[row] if result.lost_bits else None,
            "events": [list(event) for event in result.events[row]],
            "text": text,
            "lengths": [len(piece) for piece in pieces],
            "tokens": tokens,
        }

    def _warm_up(self, combination: Combination, i: int) -> None:
        """Two tokens that nobody sees: what happens once (thread pools, code paged in) is in no problem's TTFT."""
        with self._loop(combination, [i], max_new_tokens=2) as loop:
            for _ in loop:
                pass

    def _loop(self, combination: Combination, batch: list[int], **overrides) -> DecodeLoop:
        try:
            return DecodeLoop(
                self.model,
                [self.prompts[i] for i in batch],
                policy=combination.policy,
                guardian=stops.parse(combination.stop),
                action=stops.action(combination.stop, self.answer),
                # By problem: draws depend neither on the batch nor on the order of the problems.
                seed=[seed_of(self.seed, self.problems[i].id) for i in batch],
                **{**self.loop_options, **overrides},
                **combination.policy_options,
            )
        # torch's allocators raise nothing more specific.
        except RuntimeError as error:
            raise ValueError(f"{combination.name}: no memory for {len(batch)} problems at once: {error}") from error


def seed_of(seed: int, id: str) -> int:
    """A problem's own seed, the same on every machine."""
    return int.from_bytes(hashlib.sha256(f"{seed} {id}".encode()).digest()[:4], "big")

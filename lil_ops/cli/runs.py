"""The runs of one command: which there are, and how one is decoded."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lil_ops.cli.errors import UserError, user_errors

if TYPE_CHECKING:
    from lil_ops import DecodeLoop, Guardian
    from lil_ops.actions import Action
    from lil_ops.result import GenerationResult, StepEvent


@dataclass(frozen=True)
class Run:
    """A policy with its options, with or without the early stop."""

    policy: str
    policy_options: dict
    guardian: Guardian | None

    @property
    def name(self) -> str:
        policy = "dense" if self.policy == "full" else self.policy
        return f"{policy} + Guardian" if self.guardian else policy


@dataclass(frozen=True)
class Outcome:
    """What a run gave; ``result`` has one sequence."""

    run: Run
    result: GenerationResult
    interrupted: bool

    @property
    def tokens(self) -> list[int]:
        return self.result.tokens[0]

    @property
    def stop_reason(self) -> str:
        """eos, length, guardian or interrupted."""
        reason = self.result.stop_reason[0].name.lower()
        return "interrupted" if reason == "running" else reason


def plan(policy: str, policy_options: dict, guardian: Guardian | None, compare: bool) -> list[Run]:
    """The runs in the order of the table; the last one is what the user asked for."""
    chosen = Run(policy, policy_options, guardian)
    if not compare:
        return [chosen]
    pairs = [("full", {}), (policy, policy_options)]
    runs = [Run(*pair, early_stop) for pair in pairs for early_stop in (None, guardian)]
    # By name, so that full against full, or no Guardian, gives no row twice.
    return list({run.name: run for run in runs}.values())


def make_action(name: str, tokenizer, answer_text: str | None, answer_tokens: int) -> Action | None:
    """What the Guardian brings about. `UserError` where nothing says how to close the thinking."""
    from lil_ops import Answer, Rescue

    with user_errors(ValueError):
        if name == "answer":
            return Answer.from_tokenizer(tokenizer, answer_text, answer_tokens)
    return Rescue() if name == "rescue" else None


class Decoder:
    """Decodes one prompt on one model, with the same `DecodeLoop` options in every run; ``action`` in those that have a
    Guardian."""

    def __init__(self, model, prompt_ids: list[int], loop_options: dict, action: Action | None = None):
        self._model, self._prompt_ids, self._options, self._action = model, prompt_ids, loop_options, action

    def warm_up(self, run: Run) -> None:
        """Two tokens that nobody sees: first-run costs (thread pools, code and weights paged in) are in no row's TTFT.

        Raises `UserError` where the model, the prompt or an option does not fit the others.
        """
        with self._loop(run) as loop:
            for event in loop:
                if event.step:
                    break

    def decode(self, run: Run, on_step: Callable[[StepEvent], object]) -> Outcome:
        """The whole run, or what there is of it when Ctrl-C comes."""
        interrupted = False
        with self._loop(run) as loop:
            try:
                for event in loop:
                    on_step(event)
            except KeyboardInterrupt:
                interrupted = True
        return Outcome(run, loop.result(), interrupted)

    def _loop(self, run: Run, **overrides) -> DecodeLoop:
        from lil_ops import DecodeLoop

        options = {**self._options, **overrides}
        try:
            with user_errors(ValueError):
                return DecodeLoop(
                    self._model,
                    [self._prompt_ids],
                    policy=run.policy,
                    guardian=run.guardian,
                    action=self._action if run.guardian else None,
                    **run.policy_options,
                    **options,
                )
        # torch's allocators raise nothing more specific.
        except RuntimeError as error:
            tokens = len(self._prompt_ids) + options["max_new_tokens"]
            raise UserError(f"no memory for {tokens} tokens: {error}") from error

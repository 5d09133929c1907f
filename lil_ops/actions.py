"""What happens when a stop rule fires: by default the sequence ends; or it is made to answer, or gets its information
back for a while."""

from __future__ import annotations

import operator
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from lil_ops.checks import INT32_MAX, is_whole

THINK_END = "</think>"


class ActionEvent(NamedTuple):
    """``what`` happened behind the sequence's ``at``-th new token: "answer", "rescue" or "recovered"."""

    at: int
    what: str


@dataclass(frozen=True)
class Answer:
    """Close the thinking, and let the model answer.

    ``tokens`` (ids, such as those of ``</think>``) become the next tokens of the output; behind them the model goes on
    by itself until it ends the sequence, for at most ``max_tokens``. No rule looks at an answer. It lies within the
    generation's ``max_new_tokens``.
    """

    tokens: Sequence[int]
    max_tokens: int = 256

    def __post_init__(self):
        object.__setattr__(self, "tokens", tuple(operator.index(token) for token in self.tokens))
        if not self.tokens:
            raise ValueError("Answer: tokens: expected at least one id, got none")
        if not is_whole(self.max_tokens, 1, INT32_MAX):
            raise ValueError(
                f"Answer: max_tokens: expected a whole number from 1 to 2**31 - 1, got {self.max_tokens!r}"
            )

    def check(self, vocab_size: int) -> None:
        """Raise ValueError where an id is none of the model's."""
        for token in self.tokens:
            if not 0 <= token < vocab_size:
                raise ValueError(f"Answer: tokens: expected ids from 0 to {vocab_size - 1}, got {token}")

    @classmethod
    def from_tokenizer(cls, tokenizer, text: str | None = None, max_tokens: int = 256) -> Answer:
        """With the ids of ``text``; by default of ``</think>``, where the chat template knows it.

        Raises ValueError where it does not.
        """
        if text is None:
            if THINK_END not in (getattr(tokenizer, "chat_template", None) or ""):
                raise ValueError(f"Answer: text: the chat template has no {THINK_END}; say what ends the thinking")
            text = f"\n{THINK_END}\n\n"
        return cls(tokenizer(text, add_special_tokens=False).input_ids, max_tokens)


@dataclass(frozen=True)
class Rescue:
    """Read more for one interval of the rule; end the sequence only if the rule fires again at its end.

    Where it does not, the policy has its budget back: the sequence has recovered. For policies that hold everything;
    elsewhere what is gone cannot be read.

    Args:
        budget: tokens to read meanwhile; None: all. A number needs a policy with page scores (`Policy.tells_loss`).
        limit: rescues of one sequence. then: an `Answer`, in place of the end.
    """

    budget: int | None = None
    limit: int = 3
    then: Answer | None = None

    def __post_init__(self):
        for option, value in ("budget", 1 if self.budget is None else self.budget), ("limit", self.limit):
            if not is_whole(value, 1, INT32_MAX):
                raise ValueError(f"Rescue: {option}: expected a whole number from 1 to 2**31 - 1, got {value!r}")
        if self.then is not None and not isinstance(self.then, Answer):
            raise ValueError(f"Rescue: then: expected an Answer or None, got {self.then!r}")

    def check(self, policy) -> None:
        """Raise ValueError where the policy cannot read more."""
        if policy.memory != "grows":
            raise ValueError(
                f"Rescue: policy {policy.name} has forgotten what it would read; it needs one that holds all"
            )
        if self.budget is not None and not policy.tells_loss:
            raise ValueError(f"Rescue: budget: policy {policy.name} has no page scores to choose more by; leave it out")


Action = Answer | Rescue


@dataclass
class Course:
    """One sequence's way through the actions. ``events``: what happened.

    ``forced``: ids that become its next tokens. ``limit``: tokens at which it ends, or None. ``rescued_until``: tokens
    up to which it reads more, or None.
    """

    action: Action | None
    interval: int
    events: list[ActionEvent] = field(default_factory=list)
    forced: deque[int] = field(default_factory=deque)
    limit: int | None = None
    rescued_until: int | None = None
    _rescues: int = 0

    def fired(self, at: int) -> bool:
        """The rule fired behind token ``at``; whether the sequence goes on."""
        if self.limit is not None:
            return True
        action, again = self.action, self.rescued_until is not None
        if isinstance(action, Rescue):
            if not again and self._rescues < action.limit:
                self._rescues += 1
                self.rescued_until = at + self.interval
                self.events.append(ActionEvent(at, "rescue"))
                return True
            action = action.then
        self.rescued_until = None
        if action is None:
            return False
        self.forced.extend(action.tokens)
        self.limit = at + len(action.tokens) + action.max_tokens
        self.events.append(ActionEvent(at, "answer"))
        return True

    def went_on(self, at: int) -> None:
        """Token ``at`` came, and the rule did not fire behind it."""
        if self.rescued_until is not None and at >= self.rescued_until:
            self.rescued_until = None
            self.events.append(ActionEvent(at, "recovered"))

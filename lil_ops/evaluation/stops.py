"""Stop rules by name, as the command line writes them: ``off``, ``guardian``, ``guardian:64:5``; and what they bring
about where it is not the end: ``guardian:64:5+answer``, ``...+rescue``, ``...+rescue+answer``.

A rule of another kind is a subclass of `StopRule`, and an entry of `RULES`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from lil_ops.actions import Action, Answer, Rescue
from lil_ops.baselines import Repetition, TokenBudget
from lil_ops.guardian import Guardian
from lil_ops.stopping import StopRule


class Kind(NamedTuple):
    """make: the rule, of the parts of its name behind the kind. parts: those parts, of the rule, in one way only."""

    make: Callable[..., StopRule | None]
    parts: Callable[[StopRule | None], list[str]]


def guardian(interval: str = "250", threshold: str = "20", unit: str = "phrases") -> Guardian:
    """``guardian[:INTERVAL:THRESHOLD[:UNIT]]``; without numbers the published ones."""
    return Guardian(int(interval), float(threshold), unit)


def guardian_parts(rule: Guardian) -> list[str]:
    return [str(rule.interval), _shortest(rule.threshold), *([rule.unit] if rule.unit != "phrases" else [])]


def _shortest(number: float) -> str:
    """As it reads back: 5 for 5.0."""
    return repr(number).removesuffix(".0")


def loss(interval: str = "250", threshold: str = "20", weight: str = "1") -> Guardian:
    """``loss[:INTERVAL:THRESHOLD[:WEIGHT]]``: the loss-aware Guardian."""
    return Guardian(int(interval), float(threshold), loss_aware=True, loss_weight=float(weight))


ACTIONS = ("answer", "rescue", "rescue+answer")
RULES = {
    "off": Kind(lambda: None, lambda rule: []),
    "guardian": Kind(guardian, guardian_parts),
    "loss": Kind(loss, lambda rule: [str(rule.interval), _shortest(rule.threshold), _shortest(rule.loss_weight)]),
    # MAX_PATTERN:MIN_PATTERN:COUNT
    "repetition": Kind(
        lambda *parts: Repetition(*map(int, parts)),
        lambda rule: [str(rule.max_pattern), str(rule.min_pattern), str(rule.count)],
    ),
    "tokens": Kind(lambda count: TokenBudget(int(count)), lambda rule: [str(rule.tokens)]),
}


def parse(name: str) -> StopRule | None:
    """The rule of this name; None for ``off``. Raises ValueError for a name that means none."""
    written, plus, action = name.partition("+")
    kind, *parts = written.split(":")
    if plus and (action not in ACTIONS or kind == "off"):
        raise ValueError(f"stop rule {name!r}: expected one of {', '.join(ACTIONS)} behind a rule and its +")
    if kind not in RULES:
        raise ValueError(f"unknown stop rule {name!r}: expected one of {', '.join(RULES)}, as in guardian:64:5")
    if kind in ("guardian", "loss") and len(parts) == 1:
        raise ValueError(f"stop rule {name!r}: expected {kind}:INTERVAL:THRESHOLD, or {kind} alone")
    try:
        return RULES[kind].make(*parts)
    except (TypeError, ValueError) as error:
        # What int() and float() say of a word does not say where it stood.
        reason = error if ": expected" in str(error) else "expected numbers, as in guardian:64:5"
        raise ValueError(f"stop rule {name!r}: {reason}") from error


def canonical(name: str) -> str:
    """One name for one rule: ``guardian`` and ``guardian:250:20`` are the same."""
    rule, (written, plus, action) = parse(name), name.partition("+")
    kind = written.partition(":")[0]
    return ":".join([kind, *RULES[kind].parts(rule)]) + plus + action


def answers(name: str) -> bool:
    """Whether the rule of this name may bring about an answer."""
    return "answer" in name.partition("+")[2]


def action(name: str, answer: Answer | None) -> Action | None:
    """What the rule of this name brings about; ``answer`` is the one to give, where `answers`."""
    wanted = name.partition("+")[2]
    then = answer if answers(name) else None
    return Rescue(then=then) if wanted.startswith("rescue") else then

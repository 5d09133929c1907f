"""What one command runs: each policy with each budget under each stop rule."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from lil_ops import policies
from lil_ops.evaluation import stops

Value = bool | int | float | str


@dataclass(frozen=True)
class Combination:
    """A policy with its options (the budget is one) and the name of a stop rule."""

    policy: str
    policy_options: dict[str, Value]
    stop: str

    @property
    def name(self) -> str:
        """Of its file: ``full.off``, ``quest-64.guardian-64-5``, ``quest-64-scoring=meanstd.off``."""
        return f"{policy_name(self.policy, self.policy_options, '-')}.{self.stop.replace(':', '-')}"


def policy_name(policy: str, options: dict[str, Value], separator: str = " ") -> str:
    """Policy, budget, other options: ``quest 64``, ``quest 64 scoring=meanstd``."""
    others = [f"{name}={_written(value)}" for name, value in sorted(options.items()) if name != "budget"]
    budget = [_written(options["budget"])] if "budget" in options else []
    return separator.join([policy, *budget, *others])


def grid(policy_specs: Sequence[str], budgets: Sequence[str], stop_names: Sequence[str]) -> list[Combination]:
    """Every combination once. A policy is ``NAME`` or ``NAME:OPTION=VALUE:...``; one that takes no budget, or brings
    its own, is combined with none of ``budgets``. Raises ValueError for whatever means nothing."""
    combinations = {}
    for spec in policy_specs:
        policy, *parts = spec.split(":")
        options = dict(_option(spec, part) for part in parts)
        # `get` knows what is wrong with a name.
        taken = policies.options_of(policies.POLICIES[policy]) if policy in policies.POLICIES else []
        own = "budget" in options or "budget" not in taken or not budgets
        for budget in [{}] if own else [{"budget": _value(budget)} for budget in budgets]:
            for stop in stop_names:
                rule, chosen_options = stops.parse(stop), options | budget
                if rule and rule.needs_loss:
                    chosen_options = policies.with_loss(policy, chosen_options)
                chosen = Combination(policy, chosen_options, stops.canonical(stop))
                policies.get(policy, **chosen.policy_options)
                combinations[chosen.name] = chosen
    return list(combinations.values())


def _option(spec: str, part: str) -> tuple[str, Value]:
    name, equals, value = part.partition("=")
    if not (name and equals and value):
        raise ValueError(f"policy {spec!r}: expected OPTION=VALUE after a colon, got {part!r}")
    return name.replace("-", "_"), _value(value)


def _value(text: str) -> Value:
    if text in ("true", "false"):
        return text == "true"
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            pass
    return text


def _written(value: Value) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)

"""Stop rules by name, as the command line writes them: ``off``, ``guardian``, ``guardian:64:5`` (or ``:bits``).

A rule of another kind is a class with `StopRule`'s method, and a line in `RULES` that makes it from the parts of its
name.
"""

from __future__ import annotations

from collections.abc import Callable

from lil_ops.guardian import Guardian, StopRule


def guardian(interval: str = "250", threshold: str = "20", unit: str = "phrases") -> Guardian:
    """``guardian[:INTERVAL:THRESHOLD[:UNIT]]``; without numbers the published ones."""
    return Guardian(int(interval), float(threshold), unit)


RULES: dict[str, Callable[..., StopRule | None]] = {"off": lambda: None, "guardian": guardian}


def parse(name: str) -> StopRule | None:
    """The rule of this name; None for ``off``. Raises ValueError for a name that means none."""
    kind, *parts = name.split(":")
    if kind not in RULES:
        raise ValueError(f"unknown stop rule {name!r}: expected one of {', '.join(RULES)}, as in guardian:64:5")
    if kind == "guardian" and len(parts) == 1:
        raise ValueError(f"stop rule {name!r}: expected guardian:INTERVAL:THRESHOLD, or guardian alone")
    try:
        return RULES[kind](*parts)
    except (TypeError, ValueError) as error:
        # What int() and float() say of a word does not say where it stood.
        reason = error if str(error).startswith("Guardian") else "expected numbers, as in guardian:64:5"
        raise ValueError(f"stop rule {name!r}: {reason}") from error


def name_of(rule: StopRule | None) -> str:
    """One name for one rule: ``guardian`` and ``guardian:250:20`` are the same."""
    if not isinstance(rule, Guardian):
        return "off"
    unit = "" if rule.unit == "phrases" else f":{rule.unit}"
    return f"guardian:{rule.interval}:{rule.threshold:g}{unit}"

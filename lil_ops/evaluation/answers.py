r"""The answer that a text gives, and whether it is the right one.

How to find it, by name:

- ``math``: the last ``\boxed{...}``, or else what math-verify takes for the answer. Numbers, fractions and LaTeX.
- ``boxed``: the last ``\boxed{...}`` and nothing else.
- ``number``: the last number.
- ``regex:PATTERN``: the last match: its first group, or all of it where it has none.

The first two compare as mathematics (math-verify, extra ``eval``), the others as numbers, or else as text.
"""

from __future__ import annotations

import logging
import re
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction

from lil_ops.evaluation.extras import require

# The minus of 10-15 is none of 15's.
NUMBER = re.compile(r"(?:(?<!\d)-)?(?:(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?(?:/\d+)?|\.\d+)")


@dataclass(frozen=True)
class Checker:
    """``find``: the answer that a text gives, or None. ``equal``: whether that is the right one."""

    find: Callable[[str], str | None]
    equal: Callable[[str, str], bool]

    def check(self, text: str, right: str) -> tuple[str | None, bool]:
        """The answer that ``text`` gives, and whether it equals ``right``."""
        answer = self.find(text)
        return answer, answer is not None and self.equal(right, answer)


def checker(name: str) -> Checker:
    """The checker of this name. Raises ValueError for an unknown one, `MissingExtraError` without math-verify."""
    kind, _, pattern = name.partition(":")
    if kind == "regex" and pattern:
        try:
            compiled = re.compile(pattern)
        except re.error as error:
            raise ValueError(f"answer: {pattern!r} is no regular expression: {error}") from error
        return Checker(lambda text: _last_match(compiled, text), same)
    if name == "number":
        return Checker(lambda text: _last_match(NUMBER, text), same)
    if name in ("math", "boxed"):
        mathematics = Mathematics()
        return Checker(mathematics.find if name == "math" else last_boxed, mathematics.equal)
    raise ValueError(f"answer: expected math, boxed, number or regex:PATTERN, got {name!r}")


def same(right: str, answer: str) -> bool:
    """Equal as numbers where both are, else as text."""
    numbers = number(right), number(answer)
    return numbers[0] == numbers[1] if None not in numbers else right.strip() == answer.strip()


def number(text: str) -> Fraction | None:
    """The number that a text is: 1,234; -0.5; 3/4; $18. None where it is something else."""
    text = text.strip().strip("$%").removesuffix(".")
    try:
        return Fraction(text.replace(",", "")) if NUMBER.fullmatch(text) else None
    except (ValueError, ZeroDivisionError):  # 1.5/2; 1/0
        return None


def last_boxed(text: str) -> str | None:
    r"""What is in the last ``\boxed{...}`` that is closed; braces inside it are matched."""
    for start in reversed([match.end() for match in re.finditer(r"\\boxed\s*\{", text)]):
        depth = 1
        for end in range(start, len(text)):
            depth += {"{": 1, "}": -1}.get(text[end], 0)
            if depth == 0:
                return text[start:end].strip()
    return None


def _last_match(pattern: re.Pattern, text: str) -> str | None:
    matches = deque(pattern.finditer(text), maxlen=1)
    # A group that took no part in the match is None too.
    return matches[0][1 if pattern.groups else 0] if matches else None


class Mathematics:
    """math-verify: what a text means, and whether two answers mean the same."""

    def __init__(self):
        self._library = require("math_verify", "eval")
        # It warns of each text that it cannot read, which is not news here.
        logging.getLogger("math_verify").setLevel(logging.CRITICAL)
        # A replay asks for the same answers again and again.
        self._equal: dict[tuple[str, str], bool] = {}

    def find(self, text: str) -> str | None:
        if (boxed := last_boxed(text)) is not None:
            return boxed
        meanings = self._library.parse(text)
        return str(meanings[-1]) if meanings else None

    def equal(self, right: str, answer: str) -> bool:
        key = right, answer
        if key not in self._equal:
            self._equal[key] = self._means_the_same(right, answer)
        return self._equal[key]

    def _means_the_same(self, right: str, answer: str) -> bool:
        if same(right, answer):
            return True
        # In a box both are read as they are; outside of one it looks for the part of a text that is the answer.
        return self._library.verify(*(self._library.parse(f"\\boxed{{{each}}}") for each in (right, answer)))

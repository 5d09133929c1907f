"""What options are checked for."""

from __future__ import annotations

from math import inf
from numbers import Integral, Real

INT32_MAX = 2**31 - 1  # what the operators count tokens with


def is_whole(value: object, least: float = -inf, most: float = inf) -> bool:
    """Whether it is a whole number from ``least`` to ``most``. Those of numpy are; True and False are not."""
    return isinstance(value, Integral) and is_number(value, least, most)


def is_number(value: object, least: float = -inf, most: float = inf) -> bool:
    """Whether it is a real number from ``least`` to ``most``. Those of numpy are; NaN, True and False are not."""
    return isinstance(value, Real) and not isinstance(value, bool) and least <= value <= most

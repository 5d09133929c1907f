"""What options are checked for."""

from __future__ import annotations

from numbers import Integral


def is_whole(value: object, least: int, most: int = 2**31 - 1) -> bool:
    """Whether it is a whole number from ``least`` to ``most``. Those of numpy are; True and False are not."""
    return isinstance(value, Integral) and not isinstance(value, bool) and least <= value <= most

"""Estimates over problems, with bootstrap confidence intervals.

Problems are what is drawn: a comparison of two runs on the same problems draws both runs' values together.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

RESAMPLES = 2000
CONFIDENCE = 0.95


class Estimate(NamedTuple):
    """A value, its 95 % interval (percentiles of the bootstrap), and how many problems it is over."""

    value: float
    low: float
    high: float
    n: int


def mean(values: Sequence[float]) -> Estimate:
    """The mean over problems."""
    return ratio(values, np.ones(len(values)))


def ratio(above: Sequence[float], below: Sequence[float]) -> Estimate:
    """The sum of ``above`` by the sum of ``below``, both with one entry a problem; NaN where that is nothing."""
    above, below = np.asarray(above, dtype=float), np.asarray(below, dtype=float)
    if len(above) != len(below):
        raise ValueError(f"ratio: expected as many values above as below, got {len(above)} and {len(below)}")
    if len(above) == 0:
        return Estimate(*[float("nan")] * 3, 0)
    n = len(above)
    counts = _resamples(n)
    with np.errstate(divide="ignore", invalid="ignore"):
        drawn, value = (counts @ above) / (counts @ below), above.sum() / below.sum()
    tail = (1 - CONFIDENCE) / 2
    # A resample of zeros alone has no ratio.
    drawn = drawn[np.isfinite(drawn)]
    low, high = np.quantile(drawn, [tail, 1 - tail]) if len(drawn) else (value, value)
    return Estimate(float(value), float(low), float(high), n)


@functools.lru_cache(maxsize=4)
def _resamples(n: int) -> np.ndarray:
    """How often each resample drew each of ``n`` problems; the same for every estimate over so many."""
    return np.random.default_rng(0).multinomial(n, np.full(n, 1 / n), size=RESAMPLES).astype(float)

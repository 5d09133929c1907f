"""Shared by the benchmarks: two threads, one read-bandwidth measurement a run, and a terminal table with ratios."""

from __future__ import annotations

import statistics
import time

import pytest
import torch

THREADS = 2
READ_BYTES = 1 << 29


@pytest.fixture(scope="session", autouse=True)
def threads():
    torch.set_num_threads(THREADS)


def measure_read_bandwidth() -> float:
    """Bytes a second of a sum over 512 MB, median of 9."""
    data = torch.ones(READ_BYTES // 4)
    seconds = []
    for _ in range(10):
        start = time.perf_counter()
        data.sum()
        seconds.append(time.perf_counter() - start)
    return READ_BYTES / statistics.median(seconds[1:])


@pytest.fixture
def measure(benchmark):
    """``measure(case, variant, function, bytes=None)`` times one variant ("lil" or a peer's name) of a case.

    The read bandwidth is measured right before, on the same machine state, and kept with the result.
    """

    def run(case: str, variant: str, function, *, bytes: int | None = None, rounds: int | None = None, **facts):
        benchmark.group = case
        benchmark.extra_info.update(case=case, variant=variant, **facts)
        if bytes:
            benchmark.extra_info.update(bytes=bytes, read_bandwidth=measure_read_bandwidth())
        function()  # first-touch, caches and thread pool
        if rounds:
            benchmark.pedantic(function, rounds=rounds, iterations=1, warmup_rounds=1)
        else:
            benchmark(function)

    return run

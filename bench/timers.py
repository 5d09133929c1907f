"""Times on a GPU, by events: medians of repeated calls, the first ones left out."""

from __future__ import annotations

import statistics
from collections.abc import Callable

import torch

REPEATS, WARM_UP = 15, 2


def median_us(run: Callable[[], object], repeats: int = REPEATS) -> float:
    """Microseconds of a call."""
    times = []
    for _ in range(WARM_UP + repeats):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 1e3)
    return statistics.median(times[WARM_UP:])


def layer_us(graph: torch.cuda.CUDAGraph, layers: int, least: int = 1) -> float:
    """Microseconds of one of the layers in a graph, which is replayed several times where they are few.

    least: replays of which a time is the mean, where not all of them do the same.
    """
    rounds = max(least, 64 // layers)

    def replays() -> None:
        for _ in range(rounds):
            graph.replay()

    return median_us(replays) / rounds / layers


def kernels_of(profile: torch.profiler.profile) -> list[tuple[float, float, str]]:
    """When each kernel began and ended, in microseconds, and its name; by when they began."""
    return sorted(
        (event.time_range.start, event.time_range.end, event.name)
        for event in profile.events()
        if event.device_type == torch.autograd.DeviceType.CUDA
    )


def read_bandwidth() -> float:
    """Bytes a second of a bf16 sum over 2 GB."""
    data = torch.ones(1 << 30, dtype=torch.bfloat16, device="cuda")
    return data.numel() * 2 / median_us(data.sum, repeats=10) * 1e6

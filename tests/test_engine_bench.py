"""bench/engine_gpu.py: what it makes of a profile."""

import operator
import os
from types import SimpleNamespace as Some

import pytest

pytest.importorskip("transformers")

import torch


def test_kernels_that_wait_for_each_other_count_once(bench):
    engine_gpu = bench("engine_gpu")
    kernels = [(0, 4, "a"), (1, 5, "lz77"), (2, 6, "guardian"), (9, 10, "b")]
    assert engine_gpu.busy(kernels) == 7
    assert engine_gpu.gaps_between(kernels) == [0, 0, 3]
    found = engine_gpu.of_kernels(kernels)
    assert found["stop_us"] == round(5 / engine_gpu.PROFILED, 2)
    assert found["gap_us"] == 3


def test_kernels_of_a_profile(bench):
    def event(start, end, name, device="CUDA"):
        of = getattr(torch.autograd.DeviceType, device)
        return Some(time_range=Some(start=start, end=end), name=name, device_type=of)

    events = [event(3, 4, "b"), event(1, 2, "a"), event(0, 9, "launch", "CPU")]
    assert bench("timers").kernels_of(Some(events=lambda: events)) == [(1, 2, "a"), (3, 4, "b")]


def test_each_case_has_a_process_of_its_own(bench):
    in_own_process = bench("engine_gpu").in_own_process
    assert in_own_process(os.getpid) != os.getpid()
    with pytest.raises(ZeroDivisionError):
        in_own_process(operator.truediv, 1, 0)


def test_a_complete_run_takes_the_place_of_its_command_on_its_device(bench):
    with_earlier = bench("engine_gpu").with_earlier
    pairs = zip("aabaa", "xxxyx", strict=True)
    run, *earlier = ({"command": a, "device": b, "commit": i} for i, (a, b) in enumerate(pairs))
    assert with_earlier(run, earlier, complete=False) == [run, *earlier]
    assert with_earlier(run, earlier, complete=True) == [run, earlier[1], earlier[2]]

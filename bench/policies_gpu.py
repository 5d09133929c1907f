#!/usr/bin/env python3
"""What each policy's decision costs on one GPU, beside dense attention: bench/policies_gpu.py [--out FILE]

A decision is all that a policy does in a step but the attention: write, select, observe. Figures are microseconds of
one layer, medians of CUDA-graph replays over enough layers that L2 cannot help with what grows with the context; each
replay is one token further on. Writes JSON with device, versions, commit and every figure; prints each as it comes.
"""

from __future__ import annotations

import argparse
import datetime
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from policy_case import BUDGET, CONTEXTS, HEAD_DIM, KV_HEADS, NAMES, PAGE_SIZE, DenseCase, PolicyCase  # noqa: E402
from report import report  # noqa: E402
from run import commit  # noqa: E402

import lil_ops  # noqa: E402

CASES = [(1, context) for context in CONTEXTS] + [(8, context) for context in CONTEXTS[:2]]
COLD_BYTES = 150 << 20  # three times the L2 of an H100
REPEATS, SPARE = 15, 512
RESULT = ROOT / "bench" / "results" / "policies_cuda.json"


def layers_for(bytes_of_a_layer: int) -> int:
    return max(2, min(COLD_BYTES // bytes_of_a_layer + 1, 32))


def captured(step: Callable[[], object]) -> torch.cuda.CUDAGraph:
    """Nothing runs yet."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph


def time_us(graph: torch.cuda.CUDAGraph, layers: int) -> float:
    """Microseconds of one layer. Not more than SPARE replays."""
    rounds = max(1, 64 // layers)
    times = []
    for _ in range(REPEATS + 2):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(rounds):
            graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 1e3 / rounds / layers)
    return round(statistics.median(times[2:]), 2)


def launches(step: Callable[[], object]) -> int:
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        step()
        torch.cuda.synchronize()
    return sum(event.device_type == torch.autograd.DeviceType.CUDA for event in profile.events())


def decision(name: str, batch: int, context: int) -> dict:
    summaries = batch * context // PAGE_SIZE * KV_HEADS * HEAD_DIM * 2
    case = PolicyCase(name, batch, context, spare=SPARE + 64, layers=layers_for(summaries), device="cuda")
    case.reserve(SPARE)
    case.begin_step()
    case.decide()
    case.begin_step()
    count = launches(case.decide)
    case.begin_step()  # nothing was derived from it yet: the graph has to do it

    def step():
        case.advance()
        case.decide()

    graph = captured(step)
    for _ in range(BUDGET if case.bounded else 0):  # heads are full, and evict
        graph.replay()
    us = time_us(graph, len(case.layers))
    lil_ops.check_errors()
    return {"us": us, "launches": round(count / len(case.layers), 1), "layers": len(case.layers)}


def measure(batch: int, context: int) -> dict:
    dense = DenseCase(batch, context, layers=layers_for(2 * batch * context * KV_HEADS * HEAD_DIM * 2), device="cuda")
    result = {"batch": batch, "context": context}
    for name, step in (("dense_us", dense.attend), ("append_us", dense.append)):
        step()
        result[name] = time_us(captured(step), dense.num_layers)
        print(f"batch {batch} context {context} {name:12} {result[name]:9.2f}", flush=True)
    del dense
    result["policies"] = {}
    for name in NAMES:
        torch.cuda.empty_cache()
        try:
            row = decision(name, batch, context)
        except Exception as error:  # a policy whose steps are not all alike cannot be captured
            row = {"error": f"{type(error).__name__}: {error}"[:200]}
        result["policies"][name] = row
        print(f"batch {batch} context {context} {name:12} {row}", flush=True)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=RESULT, help="where the JSON goes")
    parser.add_argument("--commit", default=commit(), help="where there is no repository")
    arguments = parser.parse_args()
    start = time.perf_counter()
    result = {
        "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
        "commit": arguments.commit,
        "device": torch.cuda.get_device_name(),
        "versions": {"torch": torch.__version__, "cuda": torch.version.cuda, "lil_ops": lil_ops.__version__},
        "command": "make bench-gpu",
        "cases": [measure(*case) for case in CASES],
    }
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(result, indent=1) + "\n")
    print(f"{time.perf_counter() - start:.0f} s")
    if arguments.out == RESULT:
        report()


if __name__ == "__main__":
    main()

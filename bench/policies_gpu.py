#!/usr/bin/env python3
"""What each policy's decision costs on one GPU, beside dense attention: bench/policies_gpu.py [--out FILE]

A decision is all that a policy does in a step but the attention: write, select, observe. Of a policy that does all of a
step in one operator it is that operator's time, less that of the attention alone over the pages that are read. Figures
are microseconds of one layer over enough layers that L2 cannot help with what grows with the context: medians of the
mean of as many CUDA-graph replays as a page has tokens, each one token further on. Writes JSON with device, versions,
commit and every figure; prints each as it comes.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from facts import add_commit, facts  # noqa: E402
from policy_case import BUDGET, CONTEXTS, HEAD_DIM, KV_HEADS, NAMES, PAGE_SIZE, DenseCase, PolicyCase  # noqa: E402
from report import report  # noqa: E402
from timers import layer_us  # noqa: E402

import lil_ops  # noqa: E402

CASES = [(1, context) for context in CONTEXTS] + [(8, context) for context in CONTEXTS[:2]]
COLD_BYTES = 150 << 20  # three times the L2 of an H100
SPARE = 512
RESULT = ROOT / "bench" / "results" / "policies_cuda.json"


def layers_for(bytes_of_a_layer: int) -> int:
    return max(2, min(COLD_BYTES // bytes_of_a_layer + 1, 32))


def captured(step: Callable[[], object]) -> torch.cuda.CUDAGraph:
    """Nothing runs yet."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph


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
    decide = case.fused if case.fuses else case.decide
    case.begin_step()
    decide()
    case.begin_step()
    count = launches(decide)
    case.begin_step()  # nothing was derived from it yet: the graph has to do it

    def step():
        case.advance()
        decide()

    graph = captured(step)
    for _ in range(BUDGET if case.bounded else 0):  # heads are full, and evict
        graph.replay()
    layers = len(case.layers)
    us, row = layer_us(graph, layers, PAGE_SIZE), {}
    if case.fuses:
        attend = case.attention()
        attend()
        attention_us = layer_us(captured(attend), layers, PAGE_SIZE)
        row = {"fused_us": round(us, 2), "attention_us": round(attention_us, 2)}
        us, count = us - attention_us, count - launches(attend)
    lil_ops.check_errors()
    row = {"us": round(us, 2), "launches": round(count / layers, 1), "layers": layers, **row}
    return row if case.policy.on_device else row | {"note": "steps without a cut"}


def baseline(batch: int, context: int) -> dict:
    """Dense attention, and a plain append."""
    dense = DenseCase(batch, context, layers=layers_for(2 * batch * context * KV_HEADS * HEAD_DIM * 2), device="cuda")
    appends = max(1, 32 // dense.num_layers)  # a graph of few launches would show its own

    def append():
        for _ in range(appends):
            dense.append()

    result = {}
    for name, step, layers in (("dense_us", dense.attend, 1), ("append_us", append, appends)):
        step()
        result[name] = round(layer_us(captured(step), dense.num_layers * layers), 2)
        print(f"batch {batch} context {context} {name:12} {result[name]:9.2f}", flush=True)
    return result


def measure(batch: int, context: int, names: list[str]) -> dict:
    result = {"batch": batch, "context": context, **baseline(batch, context), "policies": {}}
    for name in names:
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
    add_commit(parser)
    parser.add_argument("--policies", nargs="+", choices=NAMES, default=NAMES, metavar="NAME", help="these alone")
    arguments = parser.parse_args()
    start = time.perf_counter()
    of_run = facts(commit=arguments.commit)
    result = of_run | {"cases": [measure(*case, arguments.policies) for case in CASES]}
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(result, indent=1) + "\n")
    print(f"{time.perf_counter() - start:.0f} s")
    if arguments.out == RESULT:
        report()


if __name__ == "__main__":
    main()

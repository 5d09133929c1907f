#!/usr/bin/env python3
"""lz77_append on one GPU: bench/lz77_gpu.py [--out FILE]

Steps of one token, intervals of 250, and 128k tokens from scratch, over streams that are easy and hard to parse; each
result is checked against the CPU's parse. It has no peer on a GPU. Writes bench/results/lz77_cuda.json, and
docs/performance.md from it.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Callable
from pathlib import Path

import torch

BENCH = Path(__file__).resolve().parent
sys.path.insert(0, str(BENCH.parent))

from facts import add_commit, facts  # noqa: E402
from report import report  # noqa: E402
from sequences import INPUTS, VOCAB  # noqa: E402

import lil_ops  # noqa: E402

RESULT = BENCH / "results" / "lz77_cuda.json"
HISTORY, SCRATCH_TOKENS, INTERVAL, STEPS = 1 << 16, 1 << 17, 250, 64
EVERY_STEP = ("text-like", "random, vocabulary 50k", "random bits", "one repeated token")


def captured(function: Callable[[], object]) -> torch.cuda.CUDAGraph:
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        function()
    return graph


def replay_us(graph: torch.cuda.CUDAGraph) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    graph.replay()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) * 1e3


class Parse:
    """The parse of `batch` rows that go on with the same tokens; `part` is what a graph appends."""

    def __init__(self, kind: str, batch: int, history: int, width: int, parts: int):
        self.tokens = INPUTS[kind](SCRATCH_TOKENS)
        self.state = lil_ops.lz77_state(batch, history + width * parts, "cuda")
        self.part = torch.zeros(batch, width, dtype=torch.int32, device="cuda")
        self.place = 0
        if history:
            self.append(self.take(history).expand(batch, history))

    def take(self, count: int) -> torch.Tensor:
        self.place += count
        return self.tokens[self.place - count : self.place].cuda()

    def append(self, tokens: torch.Tensor) -> torch.Tensor:
        return lil_ops.lz77_append(self.state, tokens, None, VOCAB)[0]

    def check(self) -> None:
        phrases = self.append(self.part[:, :0]).unique().tolist()
        assert phrases == [lil_ops._C.lz77_trace(self.tokens[: self.place].numpy(), VOCAB)[0][-1]]
        lil_ops.check_errors()


def step_us(kind: str, batch: int, cold: bool) -> float:
    """The mean of steps of one token: in a run of them, or each after something else had the L2 cache."""
    parse = Parse(kind, batch, HISTORY, STEPS, 24)
    other = torch.empty(100 << 20 if cold else 0, dtype=torch.uint8, device="cuda")

    def steps(append: bool) -> None:
        for k in range(STEPS):
            if cold:
                other.fill_(k)
            if append:
                parse.append(parse.part[:, k : k + 1])

    graph, without, times = captured(lambda: steps(True)), captured(lambda: steps(False)) if cold else None, []
    for _ in range(24):
        parse.part.copy_(parse.take(STEPS))
        times.append((replay_us(graph) - (replay_us(without) if cold else 0)) / STEPS)
    parse.check()
    return statistics.mean(times[4:])


def interval_us(kind: str) -> float:
    parse, times = Parse(kind, 256, HISTORY, INTERVAL, 10), []
    graph = captured(lambda: parse.append(parse.part))
    for _ in range(10):
        parse.part.copy_(parse.take(INTERVAL))
        times.append(replay_us(graph))
    parse.check()
    return statistics.median(times[2:])


def from_scratch_us(kind: str) -> float:
    parse = Parse(kind, 1, 0, SCRATCH_TOKENS, 1)
    parse.part.copy_(parse.take(SCRATCH_TOKENS))

    def run() -> None:
        parse.state.zero_()
        parse.append(parse.part)

    graph = captured(run)
    times = [replay_us(graph) for _ in range(9)]
    parse.check()
    return statistics.median(times[2:])


def run_end_us() -> float:
    """The one token that ends a run of equal ones."""
    parse = Parse("one repeated token", 1, HISTORY, 1, 1)
    before, graph, times = parse.state.clone(), captured(lambda: parse.append(parse.part)), []
    for _ in range(9):
        parse.state.copy_(before)
        times.append(replay_us(graph))
    return statistics.median(times[2:])


def measure() -> list[dict]:
    rows = []

    def add(case: str, kind: str, us: float) -> None:
        rows.append({"case": case, "tokens": kind, "us": round(us, 2)})
        print(f"{case:32} {kind:34} {us:9.2f} us", flush=True)

    for kind in EVERY_STEP:
        for batch in (1, 64):
            for cold in (False, True):
                case = f"one token, batch {batch}{', cold' if cold else ''}"
                add(case, kind, step_us(kind, batch, cold))
    for kind in EVERY_STEP:
        add(f"{INTERVAL} tokens, batch 256", kind, interval_us(kind))
        torch.cuda.empty_cache()
    for kind in INPUTS:
        add("128k tokens from scratch", kind, from_scratch_us(kind))
    add("one token that ends a run of 64k", "one repeated token, then another", run_end_us())
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=RESULT, help="elsewhere: docs/performance.md is left alone")
    add_commit(parser)
    options = parser.parse_args()
    of_run = facts(commit=options.commit)
    options.out.write_text(json.dumps(of_run | {"rows": measure()}, indent=1) + "\n")
    if options.out == RESULT:
        report()


if __name__ == "__main__":
    main()

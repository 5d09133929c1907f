#!/usr/bin/env python3
"""docs/performance.md from bench/results/*.json: bench/report.py"""

from __future__ import annotations

import json
from pathlib import Path

BENCH = Path(__file__).resolve().parent
REPORT = BENCH.parent / "docs" / "performance.md"

CPU = """## CPU

{cpu}, {threads} threads, {isa}; torch {torch}; {date}, commit {commit}; `{command}`. Medians. *Share of read*: bytes
that must be read, over the time, over the bandwidth of a 512 MB read measured just before. *Against lil*: the variant's
time over ours, same run.

Unless said otherwise: bf16, 8 KV heads x group 4, head_dim 128, page 16, context 32768, budget 2048.

| case | variant | median | GB/s | share of read | against lil |
| --- | --- | ---: | ---: | ---: | ---: |"""

CUDA = """## CUDA

{device}, {read_gb_s} GB/s read (a bf16 sum over 2 GB); torch {torch}, CUDA {cuda}; {date}, commit {commit};
`{command}`. bf16, head_dim 128, page 16, budget 1024; shape A has 32 query and 8 KV heads, B 12 and 2. Microseconds of
one layer: medians of CUDA-graph replays over distinct layers (`layers` in the JSON; together the step touches three
times the L2; attend, score or select alone may touch less than that). *Limit*: bytes that must be
read, over the read bandwidth. *Gain*: append + dense over the sparse step, which appends as well; below 1 the sparse
step loses.{peers}

| shape, batch, context | step | limit | dense | limit | gain | attend 1024 | limit | append | score | limit | select |
| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |"""

NO_PEERS = " No peer was installed in this run."


def cpu_lines(result: dict) -> list[str]:
    lines = [CPU.format(**result, **result["machine"], **result["versions"])]
    for case, rows in result["cases"].items():
        ours = next((row["median_us"] for row in rows if row["variant"] == "lil"), None)
        for row in rows:
            ratio = f"{row['median_us'] / ours:.2f}x" if ours and row["variant"] != "lil" else ""
            share = f"{row['share_of_read']:.0%}" if "share_of_read" in row else ""
            rate = f"{row['gb_s']:.1f}" if "gb_s" in row else ""
            lines.append(f"| {case} | {row['variant']} | {_time(row['median_us'])} | {rate} | {share} | {ratio} |")
    return lines


def cuda_lines(result: dict) -> list[str]:
    peers = [[name for name in case["us"] if not name.startswith("lil ")] for case in result["cases"]]
    lines = [CUDA.format(**result, **result["versions"], peers="" if any(peers) else NO_PEERS)]
    for case in result["cases"]:
        us = {name.removeprefix("lil "): value for name, value in case["us"].items()}
        limit = case["limit"]
        cells = [us["step"], round(limit["attend 1024"] + limit["score"], 2), us["dense"], limit["dense"]]
        cells += [
            f"{(us['append'] + us['dense']) / us['step']:.2f}x",
            us["attend 1024"],
            limit["attend 1024"],
            us["append"],
        ]
        cells += [us["score"], limit["score"], us["select"]]
        lines.append(f"| {case['shape']}, {case['batch']}, {case['context']} | {' | '.join(map(str, cells))} |")
    if any(peers):
        lines += ["", "| shape, batch, context | peer | us | over lil's |", "| --- | --- | ---: | ---: |"]
    for case, names in zip(result["cases"], peers, strict=True):
        for name in names:
            ours = case["us"][f"lil {_counterpart(name)}"]
            ratio = f"{case['us'][name] / ours:.2f}x"
            lines.append(
                f"| {case['shape']}, {case['batch']}, {case['context']} | {name} | {case['us'][name]} | {ratio} |"
            )
    return lines


def _counterpart(peer: str) -> str:
    """Our variant that does what the peer does."""
    kinds = {"dense": "dense", "1024": "attend 1024", "score": "score", "top": "select"}
    return next(ours for word, ours in kinds.items() if word in peer)


def _time(us: float) -> str:
    return f"{us:.1f} us" if us < 1000 else f"{us / 1000:.2f} ms"


def report() -> None:
    lines = ["# Performance", "", "Generated from `bench/results/*.json` by `bench/report.py`; do not edit."]
    for name, make in (("cpu", cpu_lines), ("cuda", cuda_lines)):
        result = BENCH / "results" / f"{name}.json"
        if result.exists():
            lines += ["", *make(json.loads(result.read_text()))]
    REPORT.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    report()

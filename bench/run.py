#!/usr/bin/env python3
"""Run the benchmarks and keep the result: bench/run.py [--report-only] [PYTEST ARGUMENTS ...]

Writes bench/results/cpu.json (medians, ratios, machine, versions, date, commit) and, from it, docs/performance.md.
"""

from __future__ import annotations

import datetime
import json
import platform
import subprocess
import sys
import tempfile
from pathlib import Path

BENCH = Path(__file__).resolve().parent
RESULT = BENCH / "results" / "cpu.json"
REPORT = BENCH.parent / "docs" / "performance.md"


def run(arguments: list[str]) -> None:
    import lil_ops

    with tempfile.TemporaryDirectory() as scratch:
        raw = Path(scratch) / "raw.json"
        command = [sys.executable, "-m", "pytest", str(BENCH), "-q", "-o", "python_files=bench_*.py"]
        command += ["-p", "no:cacheprovider", f"--benchmark-json={raw}", *arguments]
        subprocess.run(command, cwd=BENCH.parent, check=True)
        measured = json.loads(raw.read_text())["benchmarks"]
    cases: dict[str, list[dict]] = {}
    for one in measured:
        info, median = one["extra_info"], one["stats"]["median"]
        row = {"variant": info.pop("variant"), "median_us": round(median * 1e6, 2), "rounds": one["stats"]["rounds"]}
        row["iqr_us"] = round(one["stats"]["iqr"] * 1e6, 2)
        if "bytes" in info:
            rate = info.pop("bytes") / median
            bandwidth = info.pop("read_bandwidth")
            row |= {"gb_s": round(rate / 1e9, 2), "read_gb_s": round(bandwidth / 1e9, 2)}
            row["share_of_read"] = round(rate / bandwidth, 3)
        cases.setdefault(info.pop("case"), []).append(row | info)
    build = lil_ops.build_info()
    result = {
        "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
        "commit": _commit(),
        "machine": {"cpu": _cpu_name(), "threads": 2, "isa": build["isa"]},
        "versions": {name: build[name] for name in ("lil_ops", "python", "torch")},
        "command": "make bench",
        "cases": cases,
    }
    RESULT.parent.mkdir(exist_ok=True)
    RESULT.write_text(json.dumps(result, indent=1) + "\n")


def report() -> None:
    result = json.loads(RESULT.read_text())
    machine, versions = result["machine"], result["versions"]
    lines = [
        "# Performance",
        "",
        "Generated from `bench/results/cpu.json` by `bench/run.py`; do not edit. Measured again by `make bench`.",
        "",
        f"{machine['cpu']}, {machine['threads']} threads, {machine['isa']}; torch {versions['torch']}; "
        f"{result['date']}, commit {result['commit']}. Medians. *Share of read*: bytes that must be read, over the time, "
        "over the bandwidth of a 512 MB read measured just before. *Against lil*: the variant's time over ours, same "
        "run.",
        "",
        "Unless said otherwise: bf16, 8 KV heads x group 4, head_dim 128, page 16, context 32768, budget 2048.",
        "",
        "| case | variant | median | GB/s | share of read | against lil |",
        "| --- | --- | ---: | ---: | ---: | ---: |",
    ]
    for case, rows in result["cases"].items():
        ours = next((row["median_us"] for row in rows if row["variant"] == "lil"), None)
        for row in rows:
            ratio = f"{row['median_us'] / ours:.2f}x" if ours and row["variant"] != "lil" else ""
            share = f"{row['share_of_read']:.0%}" if "share_of_read" in row else ""
            rate = f"{row['gb_s']:.1f}" if "gb_s" in row else ""
            lines.append(f"| {case} | {row['variant']} | {_time(row['median_us'])} | {rate} | {share} | {ratio} |")
    REPORT.write_text("\n".join(lines) + "\n")


def _time(us: float) -> str:
    return f"{us:.1f} us" if us < 1000 else f"{us / 1000:.2f} ms"


def _commit() -> str:
    """The commit that was measured; a + behind it says that the sources were changed since."""
    return _git("rev-parse", "--short", "HEAD") + ("+" if _git("status", "--porcelain", "csrc", "lil_ops") else "")


def _git(*arguments: str) -> str:
    return subprocess.run(["git", *arguments], cwd=BENCH, capture_output=True, text=True).stdout.strip()


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


if __name__ == "__main__":
    if "--report-only" not in sys.argv[1:]:
        run(sys.argv[1:])
    report()

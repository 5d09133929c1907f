#!/usr/bin/env python3
"""Run the CPU benchmarks and keep the result: bench/run.py [PYTEST ARGUMENTS ...]

Writes bench/results/cpu.json (medians, machine, versions, date, commit) and, from it, docs/performance.md (report.py).
With ARGUMENTS, such as -k long_decode, the cases that they leave replace those of the file, which says so, if this is
the machine that the file is of.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path

from facts import cpu_name, current_commit, today
from report import report

BENCH = Path(__file__).resolve().parent
RESULT = BENCH / "results" / "cpu.json"


def run(arguments: list[str]) -> None:
    result = stamp("make bench", threads=2) | {"again": {}}
    if arguments and RESULT.exists():
        machine, result = result["machine"], json.loads(RESULT.read_text())
        if result["machine"] != machine:
            raise SystemExit(f"{RESULT}: of {result['machine']}, and this is {machine}: run all the cases")
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
    RESULT.parent.mkdir(exist_ok=True)
    if arguments:
        result["again"] |= dict.fromkeys(cases, current_commit())
    result["cases"] = result.get("cases", {}) | cases
    RESULT.write_text(json.dumps(result, indent=1) + "\n")


def stamp(command: str, threads: int) -> dict:
    """When, where and of what a result is."""
    import lil_ops

    build = lil_ops.build_info()
    return {
        "date": today(),
        "commit": current_commit(),
        "machine": {"cpu": cpu_name(), "threads": threads, "isa": build["isa"]},
        "versions": {name: build[name] for name in ("lil_ops", "python", "torch")},
        "command": command,
    }


if __name__ == "__main__":
    run(sys.argv[1:])
    report()

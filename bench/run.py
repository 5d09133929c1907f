#!/usr/bin/env python3
"""Run the CPU benchmarks and keep the result: bench/run.py [PYTEST ARGUMENTS ...]

Writes bench/results/cpu.json (medians, machine, versions, date, commit) and, from it, docs/performance.md (report.py).
With ARGUMENTS, such as -k long_decode, the cases that they leave replace those of the file, which says so, if this is
the machine that the file is of.
"""

from __future__ import annotations

import datetime
import json
import platform
import subprocess
import sys
import tempfile
from pathlib import Path

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
        result["again"] |= dict.fromkeys(cases, commit())
    result["cases"] = result.get("cases", {}) | cases
    RESULT.write_text(json.dumps(result, indent=1) + "\n")


def stamp(command: str, threads: int) -> dict:
    """When, where and of what a result is."""
    import lil_ops

    build = lil_ops.build_info()
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
        "commit": commit(),
        "machine": {"cpu": cpu_name(), "threads": threads, "isa": build["isa"]},
        "versions": {name: build[name] for name in ("lil_ops", "python", "torch")},
        "command": command,
    }


def commit() -> str:
    """The commit that was measured; a + behind it says that the sources were changed since."""
    return _git("rev-parse", "--short", "HEAD") + ("+" if _git("status", "--porcelain", "csrc", "lil_ops") else "")


def command_line() -> str:
    """How this script was started; of absolute paths, which are of one machine, the last part."""
    words = [Path(word).name if word.startswith("/") else word for word in sys.argv[1:]]
    return " ".join(["python", f"bench/{Path(sys.argv[0]).name}", *words])


def _git(*arguments: str) -> str:
    return subprocess.run(["git", *arguments], cwd=BENCH, capture_output=True, text=True).stdout.strip()


def cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


if __name__ == "__main__":
    run(sys.argv[1:])
    report()

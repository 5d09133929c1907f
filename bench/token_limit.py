#!/usr/bin/env python3
"""A plain limit of tokens beside Guardian: bench/token_limit.py RUNS... [--answer HOW] [--limits N ...]

By replay on runs of `lil-ops eval --stop off`, all problems: what each rule saves, and what that does to the answers.
Of runs under a rule: the length that most of its outputs have. Where nearly all have it, the rule was a limit.
"""

from __future__ import annotations

import argparse
from collections import Counter
from pathlib import Path

from lil_ops.cli.replay import read_runs
from lil_ops.evaluation import replay, stops
from lil_ops.evaluation.report import percent, points


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path)
    parser.add_argument("--answer")
    parser.add_argument("--limits", type=int, nargs="+", default=[192, 256, 384])
    options = parser.parse_args()
    names = [*(f"tokens:{limit}" for limit in options.limits), "guardian:64:5"]
    for run in read_runs(options.runs, options.answer):
        if run.stop == "off" and run.records:
            outputs = replay.outputs(run)
            for name in names:
                effect = replay.effect([outputs], replay.replay(stops.parse(name), [outputs]))
                print(f"{run.policy:<40} {name:<14} saved {percent(effect.saved):<15} {points(effect.difference)}")
        elif run.records:
            ((length, count),) = Counter(len(record["tokens"]) for record in run.records.values()).most_common(1)
            print(f"{run.policy:<40} {run.stop:<14} most end at {length}: {count} of {len(run.records)}")


if __name__ == "__main__":
    main()

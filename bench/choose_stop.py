#!/usr/bin/env python3
"""Which interval and threshold Guardian should have: bench/choose_stop.py RUNS... [--answer HOW]

By replay on runs of `lil-ops eval --stop off`. A pair is chosen on every second problem: of those that cost no run more
than a point of its right answers there, the one that saves the most tokens of the runs that inflate (longer than dense
by a fifth, or a twentieth of them without an end). Then it is tried on the other problems, beside the published pair.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from lil_ops.cli.replay import read_runs
from lil_ops.evaluation import replay
from lil_ops.evaluation.report import percent, points
from lil_ops.guardian import Guardian

INTERVALS = 32, 48, 64, 96, 128, 192, 250
RATES = 0.02, 0.03, 0.04, 0.06, 0.08, 0.1, 0.12, 0.16  # phrases a token: threshold by interval
PUBLISHED = Guardian(250, 20)
MOST_LOST = 0.01

Runs = dict[str, dict[str, replay.Output]]


def halves(runs: Runs) -> tuple[Runs, Runs]:
    def part(start: int) -> Runs:
        return {name: {id: run[id] for id in list(run)[start::2]} for name, run in runs.items()}

    return part(0), part(1)


def inflates(run: dict[str, replay.Output], dense: dict[str, replay.Output]) -> bool:
    ended = sum(output.record["stop"] == "eos" for output in run.values())
    return ended < 0.95 * len(run) or sum(map(len, run.values())) > 1.2 * sum(map(len, dense.values()))


def effects(rule: Guardian, runs: Runs) -> dict[str, replay.Effect]:
    stops = replay.replay(rule, list(runs.values()))
    return {name: replay.effect([run], [at]) for (name, run), at in zip(runs.items(), stops, strict=True)}


def saved(found: dict[str, replay.Effect], long: list[str]) -> float:
    return sum(found[name].saved.value for name in long) / max(len(long), 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path)
    parser.add_argument("--answer")
    options = parser.parse_args()
    free = [run for run in read_runs(options.runs, options.answer) if run.stop == "off" and run.records]
    seen, unseen = halves({run.policy: replay.outputs(run) for run in free})
    long = [name for name, run in seen.items() if inflates(run, seen["dense"])]

    rules = [Guardian(f, max(1, round(f * rate))) for f in INTERVALS for rate in RATES]
    table = {(rule.interval, rule.threshold): effects(rule, seen) for rule in rules}
    print("f    t   saved of runs that inflate   worst change of right answers, in points   (problems to choose by)")
    allowed = {}
    for pair, found in table.items():
        worst = min(effect.difference.value for effect in found.values())
        if worst >= -MOST_LOST:
            allowed[pair] = saved(found, long)
        print(f"{pair[0]:<4} {pair[1]:<4g} {saved(found, long):5.0%} {100 * worst:+6.1f}")
    chosen = Guardian(*max(allowed, key=allowed.get))
    for title, rule in ("chosen", chosen), ("published", PUBLISHED):
        found = effects(rule, unseen)
        print(f"\n{title}: f = {rule.interval}, t = {rule.threshold:g}, on the other problems")
        print(f"saved of the {len(long)} runs that inflate: {saved(found, long):.0%}")
        for name, effect in found.items():
            mark = "inflates" if name in long else ""
            before, after = percent(effect.before), percent(effect.after)
            print(f"  {name:<40} saved {percent(effect.saved):<15} {before:<15} -> {after:<15}"
                  f" {points(effect.difference):<18} {mark}")  # fmt: skip


if __name__ == "__main__":
    main()

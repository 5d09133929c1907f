"""The numbers of a report: plain dictionaries, which are also its JSON."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from lil_ops.evaluation import replay
from lil_ops.evaluation.grid import policy_name
from lil_ops.evaluation.records import Run
from lil_ops.evaluation.statistics import mean, ratio
from lil_ops.guardian import Guardian
from lil_ops.policies import POLICIES

# A mean over fewer outputs than this share, or number, says more of those few than of the run.
FEWEST_SHARE, FEWEST = 0.05, 3
CURVE_POINTS = 200


def groups(runs: Sequence[Run]) -> list[list[Run]]:
    """Runs that may be compared, dense first, then by policy, options, budget and stop rule.

    Raises ValueError where two files are of the same run.
    """
    found: dict[tuple, dict[tuple, Run]] = {}
    for run in runs:
        group = found.setdefault(run.shared, {})
        if (other := group.setdefault((run.policy, run.stop), run)) is not run:
            raise ValueError(f"{other.path} and {run.path}: the same run twice; give one of them")
    return [sorted(group.values(), key=_order) for group in found.values()]


def _order(run: Run) -> tuple:
    budget = run.settings["policy_options"].get("budget", 0)
    return list(POLICIES).index(run.settings["policy"]), series(run), budget, run.stop != "off", run.stop


def series(run: Run) -> str:
    """Its policy without the budget: what one colour stands for."""
    options = {name: value for name, value in run.settings["policy_options"].items() if name != "budget"}
    return run.policy if run.policy == "dense" else policy_name(run.settings["policy"], options)


def summary(runs: list[Run], intervals: Sequence[int], thresholds: Sequence[float]) -> dict:
    """Everything that a report says of one group of runs."""
    dense = next((run for run in runs if (run.policy, run.stop) == ("dense", "off")), None)
    free = {run.policy: run for run in runs if run.stop == "off"}
    recorded = {policy: replay.outputs(run) for policy, run in free.items() if run.records}
    return {
        "settings": runs[0].settings,
        "environments": _distinct(environment for run in runs for environment in run.environments),
        "runs": [_run(run, dense, free.get(run.policy)) for run in runs],
        "growth": [_growth(free[policy], outputs) for policy, outputs in recorded.items()],
        "sensitivity": _sensitivity(recorded, intervals, thresholds),
    }


def _run(run: Run, dense: Run | None, free: Run | None) -> dict:
    records = list(run.records.values())
    lengths = [len(record["tokens"]) for record in records]
    losses = [record["lost_bits"] for record in records if record["lost_bits"] is not None]
    return {
        "name": run.name,
        "policy": run.policy,
        "series": series(run),
        "budget": run.settings["policy_options"].get("budget"),
        "stop": run.stop,
        "n": len(records),
        "problems": run.settings["problems"],
        "accuracy": mean([record["correct"] for record in records]),
        "tokens": mean(lengths),
        "ended": mean([record["stop"] == "eos" for record in records]),
        "ttft_s": mean([record["ttft_s"] for record in records]),
        # By tokens, not by problems: mean JCT is then mean TTFT + mean (tokens - 1) x this.
        "tbt_s": ratio([record["jct_s"] - record["ttft_s"] for record in records], [n - 1 for n in lengths]),
        "jct_s": mean([record["jct_s"] for record in records]),
        "kv_bytes": mean([record["kv_bytes"] for record in records]),
        "phrases_per_token": ratio([record["phrases"] for record in records], lengths),
        "lost_bits": mean(losses) if losses else None,
        "against_dense": None if dense is None or run is dense else _against(run, dense),
        "against_off": None if free is None or run is free else _against(run, free),
    }


def _against(run: Run, base: Run) -> dict:
    """On the problems that both have."""
    pairs = [(run.records[id], base.records[id]) for id in run.records if id in base.records]

    def both(value) -> tuple[list, list]:
        return [value(record) for record, _ in pairs], [value(record) for _, record in pairs]

    def length(record: dict) -> int:
        return len(record["tokens"])

    def saved(pairs: list) -> dict:
        now, before = [length(record) for record, _ in pairs], [length(other) for _, other in pairs]
        cut = [was - is_now for was, is_now in zip(before, now, strict=True)]
        return {"before": mean(before), "after": mean(now), "saved": ratio(cut, before)}

    now, before = both(lambda record: float(record["correct"]))
    return {
        "base": base.name,
        "n": len(pairs),
        "length_ratio": ratio(*both(length)),
        "jct_ratio": ratio(*both(lambda record: record["jct_s"])),
        "kv_ratio": ratio(*both(lambda record: record["kv_bytes"])),
        "accuracy_before": mean(before),
        "accuracy_difference": mean([a - b for a, b in zip(now, before, strict=True)]),
        "all": saved(pairs),
        "correct": saved([pair for pair in pairs if pair[1]["correct"]]),
        "incorrect": saved([pair for pair in pairs if not pair[1]["correct"]]),
    }


def _growth(run: Run, outputs: dict[str, replay.Output]) -> dict:
    """The mean size of the outputs that are still running after so many tokens, and how many are."""
    curves = [output.phrases for output in outputs.values()]
    lengths = np.array([len(curve) for curve in curves])
    step = max(1, lengths.max() // CURVE_POINTS)
    points = []
    for tokens in range(step, lengths.max() + 1, step):
        sizes = [int(curve[tokens - 1]) for curve in curves if len(curve) >= tokens]
        enough = len(sizes) >= max(FEWEST, FEWEST_SHARE * len(curves))
        quartiles = [float(value) for value in np.quantile(sizes, [0.25, 0.75])] if enough else [None, None]
        points.append([tokens, float(np.mean(sizes)) if enough else None, *quartiles, len(sizes) / len(curves)])
    keys = ("tokens", "size", "low", "high", "running")
    return {
        "policy": run.policy,
        "series": series(run),
        "budget": run.settings["policy_options"].get("budget"),
        "n": len(curves),
        **dict(zip(keys, (list(column) for column in zip(*points, strict=True)), strict=True)),
    }


def _sensitivity(recorded: dict[str, dict], intervals, thresholds) -> list[dict]:
    """By replay: dense, all sparse runs together, and each run alone."""
    rules = [Guardian(interval, threshold) for interval in intervals for threshold in thresholds]
    stops = [dict(zip(recorded, replay.replay(rule, list(recorded.values())), strict=True)) for rule in rules]
    sparse = [policy for policy in recorded if policy != "dense"]
    rows = {"all sparse runs": sparse} if len(sparse) > 1 else {}
    rows |= {policy: [policy] for policy in recorded}
    return [
        {
            "runs": name,
            "interval": rule.interval,
            "threshold": rule.threshold,
            **vars(replay.effect([recorded[policy] for policy in policies], [at[policy] for policy in policies])),
        }
        for name, policies in rows.items()
        for rule, at in zip(rules, stops, strict=True)
    ]


def _distinct(environments) -> list[dict]:
    """Each environment once, whatever its date."""
    found = {}
    for environment in environments:
        key = str({name: value for name, value in environment.items() if name != "date"})
        found.setdefault(key, environment)
    return list(found.values())

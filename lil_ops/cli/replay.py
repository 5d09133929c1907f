"""lil-ops replay: what Guardian would have done to runs that were recorded without a stop rule."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lil_ops.cli.errors import UserError, user_errors
from lil_ops.cli.options import listed

if TYPE_CHECKING:
    from rich.table import Table

    from lil_ops.evaluation.records import Run
    from lil_ops.evaluation.replay import Effect
    from lil_ops.guardian import Guardian

INTERVALS, THRESHOLDS = "64,125,250,500", "2,5,10,20,40"


def replay(
    runs: Annotated[
        list[Path], typer.Argument(help="Files of `lil-ops eval`, or folders of them.", show_default=False)
    ],
    interval: Annotated[str, typer.Option(help="Tokens between two checks (f), comma-separated.")] = INTERVALS,
    threshold: Annotated[str, typer.Option(help="Growth an interval must reach (t), comma-separated.")] = THRESHOLDS,
    unit: Annotated[str, typer.Option(help="What the thresholds count: phrases or bits.")] = "phrases",
    answer: Annotated[
        str | None, typer.Option(help="Judge the texts anew: math, boxed, number or regex:PATTERN.", show_default=False)
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document instead.")] = False,
) -> None:
    """Apply Guardian to recorded runs, with each interval and threshold.

    Tokens saved, and accuracy where an answer counts only if it was given before the stop; with 95 % bootstrap
    intervals over the problems. Runs with a stop rule are passed over: what it cut off is not recorded.
    """
    from rich.console import Console

    from lil_ops.evaluation import replay as stored
    from lil_ops.evaluation.extras import MissingExtraError
    from lil_ops.guardian import Guardian

    with user_errors(ValueError, MissingExtraError):
        rules = [Guardian(f, t, unit) for f in intervals_of(interval) for t in thresholds_of(threshold)]
        recorded = [run for run in read_runs(runs, answer) if run.stop == "off" and run.records]
        if not recorded:
            raise UserError("no run without a stop rule (--stop off) among the files")
        texts = [stored.outputs(run) for run in recorded]
    stops = [stored.replay(rule, texts) for rule in rules]
    console, documents = Console(), []
    for i, run in enumerate(recorded):
        effects = [stored.effect([texts[i]], [at[i]]) for at in stops]
        if as_json:
            documents.append(_document(run, rules, effects))
        else:
            console.print(_table(run, rules, effects))
    if as_json:
        print(json.dumps(documents))


def _table(run: Run, rules: list[Guardian], effects: list[Effect]) -> Table:
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    from lil_ops.evaluation.report import percent, points

    title = f"{run.policy}: {len(run.records)} problems, right answers {percent(effects[0].before)}"
    table = Table(box=SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0), title=title, title_justify="left")
    for heading in ("f", "t", "ended", "tokens saved", "right answers", "change in points", "lost"):
        table.add_column(heading, justify="right", no_wrap=True)
    for rule, effect in zip(rules, effects, strict=True):
        table.add_row(
            str(rule.interval),
            f"{rule.threshold:g}",
            f"{effect.stopped.value:.0%}",
            percent(effect.saved),
            percent(effect.after),
            points(effect.difference),
            str(effect.lost),
        )
    return table


def _document(run: Run, rules: list[Guardian], effects: list[Effect]) -> dict:
    """A run's entry of ``--json``: estimates are objects with value, low, high and n."""
    replays = [
        vars(rule) | {key: value if key == "lost" else value._asdict() for key, value in vars(effect).items()}
        for rule, effect in zip(rules, effects, strict=True)
    ]
    return {"run": str(run.path), "policy": run.policy, "problems": len(run.records), "replays": replays}


def read_runs(paths: list[Path], answer: str | None = None) -> list[Run]:
    """The runs in files and folders; judged anew where ``answer`` is given. Raises ValueError where there are none."""
    from lil_ops.evaluation import records
    from lil_ops.evaluation.answers import checker

    files = []
    for path in paths:
        found = sorted([*path.glob("*.jsonl"), *path.glob("*.jsonl.xz")]) if path.is_dir() else [path]
        if not found:
            raise ValueError(f"{path}: no .jsonl files in this folder")
        files += found
    runs = [records.read(path) for path in dict.fromkeys(files)]
    if answer is not None:
        by = checker(answer)
        for run in runs:
            run.settings["answer_by"] = answer
            for record in run.records.values():
                record["answer"], record["correct"] = by.check(record["text"], record["gold"])
    return runs


def intervals_of(text: str) -> list[int]:
    try:
        return [int(part) for part in listed(text, "interval")]
    except ValueError as error:
        raise UserError(f"--interval: expected whole numbers with commas between them, got {text!r}") from error


def thresholds_of(text: str) -> list[float]:
    try:
        return [float(part) for part in listed(text, "threshold")]
    except ValueError as error:
        raise UserError(f"--threshold: expected numbers with commas between them, got {text!r}") from error

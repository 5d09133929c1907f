"""lil-ops report: tables and figures of the runs of `lil-ops eval`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lil_ops.cli.errors import user_errors
from lil_ops.cli.replay import INTERVALS, THRESHOLDS, intervals_of, read_runs, thresholds_of


def report(
    runs: Annotated[
        list[Path], typer.Argument(help="Files of `lil-ops eval`, or folders of them.", show_default=False)
    ],
    out: Annotated[Path, typer.Option(help="Folder for the report.", show_default=False)],
    interval: Annotated[str, typer.Option(help="Guardian's intervals (f) to replay, comma-separated.")] = INTERVALS,
    threshold: Annotated[str, typer.Option(help="Guardian's thresholds (t) to replay, comma-separated.")] = THRESHOLDS,
    answer: Annotated[
        str | None, typer.Option(help="Judge the texts anew: math, boxed, number or regex:PATTERN.", show_default=False)
    ] = None,
    times: Annotated[
        bool, typer.Option("--times/--no-times", help="Show TTFT, TBT and JCT: not of runs that shared a machine.")
    ] = True,
) -> None:
    """Write a report of recorded runs: report.md with figures, report.html in one piece, and report.json.

    Length inflation, information growth, accuracy and length against the budget, what stop rules save and cost, the
    job completion time in its parts, and how sensitive Guardian is to its options.
    """
    from rich.console import Console
    from rich.text import Text

    from lil_ops.evaluation.extras import MissingExtraError
    from lil_ops.evaluation.report import write_report

    with user_errors(ValueError, OSError, MissingExtraError):
        found = read_runs(runs, answer)
        written = write_report(found, out, intervals_of(interval), thresholds_of(threshold), times)
    for path in written:
        Console().print(Text(str(path)), soft_wrap=True)

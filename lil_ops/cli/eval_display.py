"""What a person sees of `lil-ops eval`: a bar while a combination runs, a line when it has, a table at the end."""

from __future__ import annotations

import time
from collections.abc import Sequence
from statistics import fmean
from typing import TYPE_CHECKING

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from lil_ops.cli.display import REFRESH_SECONDS, seconds, size

if TYPE_CHECKING:
    from lil_ops.evaluation.records import Run


class GridView:
    """One combination while it runs. A context manager; `step` is an `OnStep`."""

    def __init__(self, console: Console, name: str, problems: int, done: int):
        self._console = console
        # Drawn by `step`, between two steps of the loop, so that drawing is in no step's time: no thread of its own.
        self._progress = Progress(
            TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
            TextColumn("{task.fields[status]}"), console=console, auto_refresh=False, transient=True,
            disable=not console.is_terminal,
        )  # fmt: skip
        self._task = self._progress.add_task(name, total=problems, completed=done, status="")
        self._done, self._stopped, self._drawn = done, 0, 0.0

    def __enter__(self) -> GridView:
        self._progress.start()
        return self

    def __exit__(self, *exception) -> None:
        self._progress.stop()

    def step(self, running: int, stopped: int, tokens: int, duration: float) -> None:
        self._stopped += stopped
        if time.monotonic() - self._drawn >= REFRESH_SECONDS:
            self._drawn = time.monotonic()
            status = f"{running} running, token {tokens}, step {seconds(duration)}"
            self._progress.update(self._task, completed=self._done + self._stopped, status=status, refresh=True)

    def finished(self, count: int) -> None:
        """A batch is on the disk with so many new problems."""
        self._done, self._stopped = self._done + count, 0
        self._progress.update(self._task, completed=self._done, refresh=True)

    def line(self, run: Run) -> None:
        """What has come out; for logs, where there is no bar."""
        records = run.records.values()
        text = f"{run.path.name}: {len(records)} problems, {sum(record['correct'] for record in records)} correct"
        self._console.print(Text(text), soft_wrap=True)


def print_summary(console: Console, runs: Sequence[Run]) -> None:
    """A row a combination. Means over its problems."""
    table = Table(box=SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    # The one column that a narrow terminal may wrap.
    table.add_column("run", overflow="fold")
    for heading in ("problems", "correct", "tokens", "ended", "TBT", "JCT", "KV"):
        table.add_column(heading, justify="right", no_wrap=True)
    for run in runs:
        records = list(run.records.values())

        def mean(key: str, records=records) -> float:
            return fmean(record[key] for record in records)

        table.add_row(
            run.name,
            str(len(records)),
            f"{mean('correct'):.1%}",
            f"{fmean(len(record['tokens']) for record in records):.0f}",
            f"{fmean(record['stop'] == 'eos' for record in records):.0%}",
            seconds(mean("tbt_s")),
            seconds(mean("jct_s")),
            size(round(mean("kv_bytes"))),
        )
    console.print(table)
    legend = "Means over the problems. ended: by an end-of-sequence token. KV: cache bytes of a problem at its end."
    console.print(Text(legend, style="dim"))

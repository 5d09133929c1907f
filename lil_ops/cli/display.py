"""What a person sees: the text as it comes, a status line under it, and the table at the end."""

from __future__ import annotations

import re
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.box import SIMPLE_HEAD
from rich.cells import chop_cells
from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from lil_ops.cli.runs import Outcome, Run
    from lil_ops.cli.text import Detokenizer
    from lil_ops.result import StepEvent

REFRESH_SECONDS = 0.1
# Everything that moves the cursor or changes the terminal's state, save newline and tab.
CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


class RunView:
    """One run while it decodes. A context manager; call `step` with every `StepEvent`.

    With a detokenizer the text goes to the console too. Where the console is no terminal, the text is all there is.
    """

    def __init__(self, console: Console, name: str, detokenizer: Detokenizer | None = None):
        self._console, self._name, self._detokenizer = console, name, detokenizer
        # Drawn by `step`, between two steps of the loop, so that drawing is in no step's time: no thread of its own.
        self._live = Live(console=console, auto_refresh=False, transient=True, redirect_stdout=False)
        self._line = ""
        self._status = f"{name}  prefill"
        self._decode_seconds = 0.0
        self._drawn = 0.0

    def __enter__(self) -> RunView:
        self._live.start()
        self._draw()
        return self

    def __exit__(self, error, *details) -> None:
        self._live.stop()
        if self._detokenizer and not error:
            self._write(self._detokenizer.rest() + "\n")

    def step(self, event: StepEvent) -> None:
        (token,), (phrases,), gain = event.tokens.values(), event.phrases.values(), event.gain.get(0, -1)
        tokens = event.step + 1
        self._decode_seconds += event.seconds if event.step else 0.0
        self._status = "  ".join(
            [
                self._name,
                f"{tokens} tokens",
                f"TBT {seconds(self._decode_seconds / max(event.step, 1))}",
                f"LZ77 {phrases / tokens:.2f}",
                *([f"gain {gain if gain >= 0 else '-'}"] if event.gain else []),
                f"KV {size(event.kv_bytes)}",
            ]
        )
        if self._detokenizer:
            self._write(self._detokenizer.push(token))
        if time.monotonic() - self._drawn >= REFRESH_SECONDS:
            self._draw()

    def _write(self, piece: str) -> None:
        """Text for the console. On a terminal only whole lines leave the live region: it starts at a line's begin."""
        if not self._console.is_interactive:
            self._console.file.write(piece)
            self._console.file.flush()
            return
        *lines, self._line = (self._line + CONTROL.sub("", piece)).split("\n")
        if lines:
            with self._console:
                for line in lines:
                    self._console.print(Text(line), soft_wrap=True)
                self._draw()

    def _draw(self) -> None:
        self._drawn = time.monotonic()
        # Broken where the terminal breaks a long line, and no taller than the screen.
        rows = chop_cells(self._line.expandtabs(), self._console.width)[-max(self._console.height - 3, 1) :]
        status = Text(self._status, style="reverse", no_wrap=True, overflow="ellipsis")
        self._live.update(Group(*map(Text, rows), status), refresh=True)


def results_table(outcomes: Sequence[Outcome]) -> Table:
    """One row a run; with a column that compares their JCT where the dense run, one of several, was finished."""
    dense = [outcome.result.jct for outcome in outcomes if outcome.run.name == "dense" and not outcome.interrupted]
    comparing = dense and len(outcomes) > 1
    table = Table(box=SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    # The one column that a narrow terminal may wrap.
    table.add_column("run")
    for heading in ("tokens", "stop", "TTFT", "TBT", "JCT", *(["JCT/dense"] if comparing else []), "KV peak", "LZ77"):
        table.add_column(heading, justify="left" if heading == "stop" else "right", no_wrap=True)
    for outcome in outcomes:
        result = outcome.result
        table.add_row(
            outcome.run.name,
            str(len(outcome.tokens)),
            outcome.stop_reason,
            seconds(result.ttft),
            seconds(result.tbt),
            seconds(result.jct),
            *([f"{result.jct / dense[0]:.2f}x"] if comparing else []),
            size(result.kv_bytes_peak),
            f"{result.ratio[0]:.2f}",
        )
    return table


def legend(run: Run, options: dict, prompt_tokens: int) -> Text:
    """What the rows have in common, the options of ``run``, and what the columns are."""
    facts = [f"{prompt_tokens} prompt tokens", f"{options['dtype']} on {options['device']}"]
    if run.policy_options:
        values = (f"{name.replace('_', ' ')} {value}" for name, value in run.policy_options.items())
        facts.append(f"{run.policy}: {', '.join(values)}")
    if guardian := run.guardian:
        net = ", what was lost taken off" if guardian.loss_aware else ""
        facts.append(f"Guardian: at least {guardian.threshold:g} {guardian.unit} in {guardian.interval} tokens{net}")
        if options.get("action", "stop") != "stop":
            facts.append(f"then {options['action']}")
    columns = "TTFT: time to first token. TBT: between tokens. JCT: in all. LZ77: phrases per token."
    return Text("; ".join(facts) + "\n" + columns, style="dim")


def seconds(value: float) -> str:
    """A duration: 12.3 ms, 4.56 s; "-" for one that was not measured."""
    if not value:
        return "-"
    return f"{_three_digits(value)} s" if value >= 1 else f"{_three_digits(value * 1e3)} ms"


def size(count: int) -> str:
    """Bytes in binary units: 512 B, 3.40 MiB."""
    value, units = float(count), ["B", "KiB", "MiB", "GiB", "TiB"]
    while value >= 1024 and len(units) > 1:
        value, units = value / 1024, units[1:]
    return f"{count} B" if units[0] == "B" else f"{_three_digits(value)} {units[0]}"


def _three_digits(value: float) -> str:
    return f"{value:.{max(0, 3 - len(str(int(value))))}f}"

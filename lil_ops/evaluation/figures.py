"""The figures of a report, from the numbers of `summary`. Matplotlib, without its global state."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

from lil_ops.evaluation.extras import require

# Okabe and Ito's, told apart by the colour-blind; dense is always black.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#8B5A2B", "#7F7F7F")
DENSE = "black"
MARKERS = "osD^vP*X"
LINES = ("-", "--", ":")
MOST_COLUMNS = 4  # of panels: more cannot be read
STYLE = {
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#dddddd",
    "grid.linewidth": 0.6,
    "legend.frameon": False,
    "figure.dpi": 100,
    "savefig.dpi": 160,
    # The same numbers give the same files.
    "svg.hashsalt": "lil-ops",
}


class Figures:
    """Draws into a folder: each method writes NAME.png and NAME.svg, and returns NAME, or None without data."""

    def __init__(self, folder: Path, prefix: str, numbers: dict):
        self._matplotlib = require("matplotlib", "eval")
        require("matplotlib.figure", "eval")
        self._folder, self._prefix = folder, prefix
        self.written: list[Path] = []
        self._runs, self._growth, self._sensitivity = (numbers[key] for key in ("runs", "growth", "sensitivity"))
        names = [name for name in _distinct(run["series"] for run in self._runs) if name != "dense"]
        self._colour = {name: COLOURS[i % len(COLOURS)] for i, name in enumerate(names)} | {"dense": DENSE}
        self._marker = {name: MARKERS[i % len(MARKERS)] for i, name in enumerate(names)} | {"dense": "o"}
        # Where colours come a second time, lines are broken.
        self._line_style = {name: LINES[i // len(COLOURS) % len(LINES)] for i, name in enumerate(names)} | {
            "dense": "-"
        }
        free = [run for run in self._runs if run["stop"] == "off" and run["n"]]
        self._dense = next((run for run in free if run["series"] == "dense"), None)
        self._sparse = [run for run in free if run["series"] != "dense"]
        self._budgets = sorted(_distinct(run["budget"] for run in self._sparse if run["budget"] is not None))

    def length_inflation(self) -> str | None:
        """Length by dense length, on the same problems."""
        runs = [run for run in self._sparse if run["against_dense"] and run["against_dense"]["n"]]
        if not runs:
            return None
        with self._matplotlib.rc_context(STYLE):
            figure, ((axes,),) = self._new(1, 1, 6.4, 3.6)
            for name, points in self._by_series(runs):
                self._line(axes, name, [(p["budget"], p["against_dense"]["length_ratio"]) for p in points], name)
            axes.axhline(1, color="black", linewidth=1.2)
            axes.text(1.01, 1, "dense", transform=axes.get_yaxis_transform(), va="center")
            axes.set_ylabel("length / dense length")
            axes.set_ylim(bottom=0)
            self._budget_axis(axes)
            self._legend(figure, axes)
            return self._save(figure, "length_inflation")

    def against_budget(self) -> str | None:
        """Accuracy and length of every policy at every budget, without a stop rule."""
        if not self._sparse:
            return None
        with self._matplotlib.rc_context(STYLE):
            figure, ((left, right),) = self._new(1, 2, 8.8, 3.6)
            for axes, key, scale in ((left, "accuracy", 100), (right, "tokens", 1)):
                for name, points in self._by_series(self._sparse):
                    self._line(axes, name, [(p["budget"], _scaled(p[key], scale)) for p in points], name)
                if self._dense:
                    value, low, high, _ = _scaled(self._dense[key], scale)
                    axes.axhline(value, color="black", linewidth=1.2, label="dense")
                    axes.axhspan(low, high, color="black", alpha=0.08, linewidth=0)
                self._budget_axis(axes)
                axes.set_ylim(bottom=0)
            left.set_ylabel("right answers (%)")
            left.set_ylim(0, 100)
            right.set_ylabel("generated tokens, mean")
            self._legend(figure, left)
            return self._save(figure, "against_budget")

    def growth(self) -> str | None:
        """LZ77 size over tokens, and how many outputs still run; a column for each budget."""
        sparse = [curve for curve in self._growth if curve["series"] != "dense"]
        dense = [curve for curve in self._growth if curve["series"] == "dense"]
        counts = Counter(curve["budget"] for curve in sparse)
        budgets = list(counts) or [None]
        if len(budgets) > MOST_COLUMNS:  # those with most curves, of equals the tightest
            budgets = sorted(sorted(counts, key=lambda budget: (-counts[budget], budget))[:MOST_COLUMNS])
        if not sparse + dense:
            return None
        with self._matplotlib.rc_context(STYLE):
            figure, rows = self._new(2, len(budgets), 1.6 + 3.1 * len(budgets), 5.2, sharex=True, sharey="row")
            for column, budget in enumerate(budgets):
                top, bottom = rows[0][column], rows[1][column]
                for curve in dense + [curve for curve in sparse if curve["budget"] == budget]:
                    name = curve["series"]
                    look = {"color": self._colour[name], "linestyle": self._line_style[name], "linewidth": 1.5}
                    tokens, size = curve["tokens"], curve["size"]
                    top.plot(tokens, [math.nan if y is None else y for y in size], label=curve["series"], **look)
                    bottom.plot([0, *tokens], [100, *(100 * share for share in curve["running"])], **look)
                if budget is not None:
                    top.set_title(f"budget {_budget(budget)}")
                bottom.set_xlabel("generated tokens")
            rows[0][0].set_ylabel("LZ77 size (phrases)\nof outputs still running")
            rows[1][0].set_ylabel("outputs still running (%)")
            rows[0][0].set_ylim(bottom=0)
            rows[1][0].set_ylim(0, 105)
            rows[0][0].set_xlim(left=0)
            self._legend(figure, *rows[0])
            return self._save(figure, "growth")

    def jct(self) -> str | None:
        """Job completion time in its parts; a panel for each stop rule."""
        stops = _distinct(run["stop"] for run in self._runs if run["n"])
        policies = _distinct(run["policy"] for run in self._runs if run["n"])
        if not policies:
            return None
        found = {(run["policy"], run["stop"]): run for run in self._runs if run["n"]}
        with self._matplotlib.rc_context(STYLE):
            columns = min(len(stops), MOST_COLUMNS)
            rows = -(-len(stops) // columns)
            height = rows * (1.5 + 0.26 * len(policies))
            figure, grid = self._new(rows, columns, 1.8 + 3.0 * columns, height, sharex=True, sharey=True)
            panels = list(grid.flat)
            for axes in panels[len(stops) :]:
                axes.set_axis_off()
            panels = panels[: len(stops)]
            for axes, stop in zip(panels, stops, strict=True):
                for place, policy in enumerate(policies):
                    run = found.get((policy, stop))
                    if run is None:
                        # On white, and off the axis: the dotted line may pass here.
                        axes.annotate(
                            "no run", (0, place), xytext=(6, 0), textcoords="offset points", va="center",
                            color="#777777", fontsize=8, bbox={"boxstyle": "square,pad=0", "color": "white"}, zorder=3,
                        )  # fmt: skip
                        continue
                    total, first = run["jct_s"], run["ttft_s"].value
                    axes.barh(place, first, color="#bbbbbb", height=0.7)
                    # Grey, so that the interval can be seen on it.
                    colour = "#777777" if run["series"] == "dense" else self._colour[run["series"]]
                    axes.barh(place, total.value - first, left=first, color=colour, height=0.7, alpha=0.85)
                    axes.errorbar(total.value, place, xerr=_bars(total), color="black", linewidth=1, capsize=2)
                axes.set_title("no stop rule" if stop == "off" else stop)
                axes.set_xlabel("seconds a problem")
                axes.grid(axis="y", visible=False)
            dense = found.get(("dense", "off"))
            if dense:
                for axes in panels:
                    axes.axvline(dense["jct_s"].value, color="black", linewidth=1, linestyle=":")
            panels[0].set_yticks(range(len(policies)), policies)
            panels[0].set_ylim(len(policies) - 0.4, -0.6)
            panels[0].set_xlim(left=0)
            return self._save(figure, "jct")

    def factors(self) -> str | None:
        """JCT by dense JCT, as the product of length and time between tokens."""
        runs = [run for run in self._sparse if run["against_dense"]]
        if not runs or not self._dense:
            return None
        with self._matplotlib.rc_context(STYLE):
            figure, ((axes,),) = self._new(1, 1, 6.4, 1.4 + 0.27 * len(runs))
            for place, run in enumerate(runs):
                values = {
                    "length": run["against_dense"]["length_ratio"].value,
                    "TBT": run["tbt_s"].value / self._dense["tbt_s"].value,
                    "JCT": run["against_dense"]["jct_ratio"].value,
                }
                axes.plot([min(values.values()), max(values.values())], [place, place], color="#cccccc", zorder=1)
                for (name, value), marker, colour in zip(values.items(), "<>D", ("#0072B2", "#E69F00", "black"),
                                                         strict=True):  # fmt: skip
                    axes.plot(value, place, marker, color=colour, label=None if place else name, markersize=6)
            axes.axvline(1, color="black", linewidth=1, linestyle=":")
            axes.set_xscale("log", base=2)
            low, high = axes.get_xlim()
            axes.set_xlim(min(low, 0.48), max(high, 2.1))
            axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}x")
            axes.set_xlabel("relative to dense")
            axes.set_ylim(len(runs) - 0.4, -0.6)
            axes.set_yticks(range(len(runs)), [run["policy"] for run in runs])
            axes.grid(axis="y", visible=False)
            self._legend(figure, axes)
            return self._save(figure, "factors")

    def sensitivity(self) -> str | None:
        """Tokens saved and accuracy kept over interval and threshold, by replay; a row for dense and one for sparse."""
        groups = [
            name for name in _distinct(row["runs"] for row in self._sensitivity) if name in ("dense", "all sparse runs")
        ] or _distinct(row["runs"] for row in self._sensitivity)[:1]
        if not groups:
            return None
        with self._matplotlib.rc_context(STYLE | {"axes.grid": False}):
            figure, panels = self._new(len(groups), 2, 8.2, 0.9 + 2.5 * len(groups))
            for (left, right), name in zip(panels, groups, strict=True):
                rows = [row for row in self._sensitivity if row["runs"] == name]
                self._heat(left, rows, "saved", f"{name}: tokens saved (%)", "Blues", 0, 100)
                self._heat(right, rows, "difference", f"{name}: right answers, change in points", "RdBu", -20, 20)
            return self._save(figure, "sensitivity")

    def _heat(self, axes, rows: list[dict], key: str, title: str, colours: str, low: float, high: float) -> None:
        intervals, thresholds = (sorted(_distinct(row[name] for row in rows)) for name in ("interval", "threshold"))
        table = [[math.nan] * len(intervals) for _ in thresholds]
        for row in rows:
            value = 100 * row[key].value
            x, y = intervals.index(row["interval"]), thresholds.index(row["threshold"])
            if math.isnan(value):
                continue
            table[y][x] = value
            dark = (abs(value) if low < 0 else value) > 0.6 * high
            written = f"{value:+.0f}" if low < 0 and round(value) else f"{abs(value):.0f}"
            axes.text(x, y, written, ha="center", va="center", color="white" if dark else "black")
        axes.imshow(table, cmap=colours, vmin=low, vmax=high, aspect="auto", origin="lower")
        axes.set_xticks(range(len(intervals)), intervals)
        axes.set_yticks(range(len(thresholds)), [f"{value:g}" for value in thresholds])
        axes.set_xlabel("interval f (tokens)")
        axes.set_ylabel("threshold t (phrases)")
        axes.set_title(title)

    def _by_series(self, runs: Sequence[dict]) -> Iterable[tuple[str, list[dict]]]:
        """Runs with a budget, those of one colour together."""
        for name in _distinct(run["series"] for run in runs):
            points = [run for run in runs if run["series"] == name and run["budget"] is not None]
            if points:
                yield name, points

    def _line(self, axes, name: str, points: list[tuple], label: str) -> None:
        # Beside each other, where intervals would cover each other.
        names = list(self._colour)
        shift = min(0.05, 0.4 / len(names)) * (names.index(name) - (len(names) - 2) / 2)
        x = [self._budgets.index(budget) + shift for budget, _ in points]
        y = [estimate.value for _, estimate in points]
        bars = [
            [error[0] for error in zipped] for zipped in zip(*(_bars(estimate) for _, estimate in points), strict=True)
        ]
        axes.errorbar(x, y, yerr=bars, label=label, color=self._colour[name], marker=self._marker[name], markersize=5,
                      linestyle=self._line_style[name], linewidth=1.3, elinewidth=1, capsize=2)  # fmt: skip

    def _budget_axis(self, axes) -> None:
        axes.set_xticks(range(len(self._budgets)), [_budget(budget) for budget in self._budgets])
        axes.set_xlim(-0.5, len(self._budgets) - 0.5)
        axes.set_xlabel("budget (tokens)")

    def _legend(self, figure, *axes) -> None:
        """One for the figure, at its right, where it covers nothing."""
        handles = {}
        for each in axes:
            for handle, label in zip(*each.get_legend_handles_labels(), strict=True):
                handles.setdefault(label, handle)
        # Series in the order of all figures; the sort keeps what is none in its own.
        order = ["dense", *self._colour]
        labels = sorted(handles, key=lambda label: order.index(label) if label in order else 0)
        figure.legend([handles[label] for label in labels], labels, loc="outside right upper")

    def _new(self, rows: int, columns: int, width: float, height: float, **sharing):
        figure = self._matplotlib.figure.Figure(figsize=(width, height), layout="constrained")
        return figure, figure.subplots(rows, columns, squeeze=False, **sharing)

    def _save(self, figure, name: str) -> str:
        name = f"{self._prefix}{name}"
        for kind, options in (("png", {}), ("svg", {"metadata": {"Date": None}})):
            self.written.append(self._folder / f"{name}.{kind}")
            figure.savefig(self.written[-1], **options)
        return name


def _distinct(values: Iterable) -> list:
    return list(dict.fromkeys(values))


def _budget(value: float) -> str:
    return f"{value:.0%}" if isinstance(value, float) else str(value)


def _bars(estimate) -> list[list[float]]:
    """How far the interval reaches below and above, as matplotlib takes it."""
    return [[max(estimate.value - estimate.low, 0)], [max(estimate.high - estimate.value, 0)]]


def _scaled(estimate, factor: float):
    return estimate._replace(value=estimate.value * factor, low=estimate.low * factor, high=estimate.high * factor)

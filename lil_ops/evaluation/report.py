"""The report of some runs: Markdown with figures, one HTML page, and the numbers as JSON, in a folder."""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

from lil_ops.evaluation.document import Document, Figure, Heading, Paragraph, Table
from lil_ops.evaluation.figures import Figures
from lil_ops.evaluation.records import Run
from lil_ops.evaluation.statistics import RESAMPLES, Estimate
from lil_ops.evaluation.summary import groups, summary

NO_DENSE = "Left out: there is no dense run without a stop rule (--policy full --stop off) of these problems."
NO_SPARSE = "Left out: there is no run of a sparse policy without a stop rule."


def write_report(
    runs: Sequence[Run], folder: Path, intervals: Sequence[int], thresholds: Sequence[float], times: bool = True
) -> list[Path]:
    """Write report.md, report.html, report.json and the figures; returns their paths.

    ``times``: False leaves times out of tables and figures. Runs of different models, problems or generation options
    get a part each. Raises ValueError where two files are of the same run, `MissingExtraError` without matplotlib.
    """
    parts = groups(runs)
    folder.mkdir(parents=True, exist_ok=True)
    document, numbers, written = Document("Sparse attention and early stop, end to end"), [], []
    document.add(
        Paragraph(
            f"Brackets are 95 % confidence intervals: percentiles of {RESAMPLES} bootstrap resamples of the problems. "
            "n is the number of problems. Comparisons are of the same problems."
        )
    )
    for place, part in enumerate(parts):
        numbers.append(summary(part, intervals, thresholds))
        figures = Figures(folder, f"{place + 1}_" if len(parts) > 1 else "", numbers[-1])
        _part(document, numbers[-1], figures, times)
        written += figures.written
    texts = {
        "report.md": document.markdown(),
        "report.html": document.html(folder),
        "report.json": json.dumps(_plain(numbers), indent=1),
    }
    for name, text in texts.items():
        (folder / name).write_text(text, encoding="utf-8")
    return [folder / name for name in texts] + written


def _part(document: Document, numbers: dict, figures: Figures, times: bool) -> None:
    runs = [run for run in numbers["runs"] if run["n"]]
    dense = any(run["policy"] == "dense" and run["stop"] == "off" for run in runs)
    sparse = any(run["policy"] != "dense" and run["stop"] == "off" for run in runs)
    _head(document, numbers)

    if times:
        _times(document, runs, figures, missing=None if dense and sparse else NO_SPARSE if dense else NO_DENSE)
    else:
        document.add(Heading(3, "Runs"))
        document.add(Paragraph("Times are left out: those of these runs are no measurements."))
        document.add(_run_table(runs, times=False))

    document.add(Heading(3, "Length inflation"))
    if dense and sparse:
        _figure(
            document, figures.length_inflation(), "Generated tokens by those of the dense run, without a stop rule."
        )
    else:
        document.add(Paragraph(NO_SPARSE if dense else NO_DENSE))

    document.add(Heading(3, "Accuracy and length against the budget"))
    if sparse:
        _figure(document, figures.against_budget(), "Without a stop rule. The dense run is a line with its interval.")
    else:
        document.add(Paragraph(NO_SPARSE))

    document.add(Heading(3, "Information growth"))
    if numbers["growth"]:
        _figure(
            document,
            figures.growth(),
            "Above: mean LZ77 size of the outputs that still run after so many tokens, drawn while enough of them do. "
            "Below: how many do. A curve falls where long outputs end.",
        )
        if not dense:
            document.add(Paragraph("There is no dense run in it."))
    else:
        document.add(Paragraph("Left out: there is no run without a stop rule."))

    _stop_rules(document, runs, times)
    _loss(document, runs)
    _sensitivity(document, numbers, figures)


def _head(document: Document, numbers: dict) -> None:
    settings = numbers["settings"]
    model, data = (name if ":" in name else Path(name).name for name in (settings["model"], settings["data"]))
    document.add(Heading(2, f"{model} on {data}"))
    sampling = f"temperature {settings['temperature']:g}" if settings["temperature"] else "greedy"
    document.add(
        Paragraph(
            f"{settings['problems']} problems, answers by {settings['answer_by']}; at most "
            f"{settings['max_new_tokens']} new tokens, {sampling}, seed {settings['seed']}, batch {settings['batch']}, "
            f"{settings['dtype']} on {settings['device']}, pages of {settings['page_size']} tokens."
        )
    )
    for ran in numbers["environments"]:
        ran = defaultdict(lambda: "unknown", ran)  # of a damaged line
        device = f"{ran['processor']}, {ran['threads']} threads" if settings["device"] == "cpu" else ran["devices"][-1]
        document.add(
            Paragraph(
                f"Ran on {device}; lil_ops {ran['lil_ops']}, commit {ran['commit'] or 'unknown'}, "
                f"torch {ran['torch']}, transformers {ran['transformers']}; {ran['date'][:10]}."
            )
        )
    for run in numbers["runs"]:
        if run["n"] < run["problems"]:
            document.add(Paragraph(f"Not finished: {run['name']} has {run['n']} of {run['problems']} problems."))


def _times(document: Document, runs: list[dict], figures: Figures, missing: str | None) -> None:
    document.add(Heading(3, "Job completion time"))
    document.add(
        Paragraph(
            "JCT = TTFT + (tokens - 1) x TBT. Means a problem; TBT is a mean over all tokens. Problems ran in batches: "
            "TTFT is the prefill of a whole batch, and a batch gets smaller, and its steps shorter, as outputs end. "
            "Intervals of times are over problems: how times differ between two starts of the same run is not in them."
        )
    )
    _figure(document, figures.jct(), "Mean JCT: light grey TTFT, then (tokens - 1) x TBT. Dotted: dense, no rule.")
    document.add(_run_table(runs, times=True))
    document.add(Heading(3, "JCT by its factors"))
    if missing:
        document.add(Paragraph(missing))
    else:
        _figure(document, figures.factors(), "Length, time between tokens and JCT, each by that of dense attention.")


def _run_table(runs: list[dict], times: bool) -> Table:
    headings = ["run", "n", "right answers", "tokens", "length / dense", "ended by itself", "KV", "phrases / token"]
    rows = []
    for run in runs:
        against = run["against_dense"]
        row = [run["name"], str(run["n"]), percent(run["accuracy"]), number(run["tokens"], 0)]
        row += [number(against["length_ratio"], 2) if against else "", f"{100 * run['ended'].value:.0f} %"]
        row += [f"{run['kv_bytes'].value / 2**20:.2f} MiB", number(run["phrases_per_token"], 3)]
        if times:
            row += [seconds(run[f"{name}_s"]) for name in ("ttft", "tbt", "jct")]
            row += [number(against["jct_ratio"], 2) if against else ""]
        rows.append(row)
    return Table(headings + (["TTFT", "TBT", "JCT", "JCT / dense"] if times else []), rows)


def _stop_rules(document: Document, runs: list[dict], times: bool) -> None:
    """With and without a stop rule: sparse, dense, and by whether the answer was right without it."""
    ruled = [run for run in runs if run["stop"] != "off" and run["against_off"] and run["against_off"]["n"]]
    headings = [
        "run",
        "n",
        "tokens without",
        "with",
        "saved",
        "right answers without",
        "change in points",
    ] + times * ["JCT with / without"]
    for title, wanted in (("sparse attention", False), ("dense attention", True)):
        document.add(Heading(3, f"Early stop with {title}"))
        chosen = [run for run in ruled if (run["policy"] == "dense") == wanted]
        if not chosen:
            document.add(Paragraph(f"Left out: {title} has no run with a stop rule beside one without (--stop off)."))
            continue
        rows = []
        for run in chosen:
            off = run["against_off"]
            rows.append(
                [
                    run["name"],
                    str(off["n"]),
                    number(off["all"]["before"], 0),
                    number(off["all"]["after"], 0),
                    percent(off["all"]["saved"]),
                    percent(off["accuracy_before"]),
                    points(off["accuracy_difference"]),
                ]
                + times * [number(off["jct_ratio"], 2)]
            )
        document.add(Table(headings, rows))
    document.add(Heading(3, "Early stop, right and wrong answers apart"))
    if not ruled:
        document.add(Paragraph("Left out: no policy has a run with a stop rule beside one without (--stop off)."))
        return
    document.add(Paragraph("Right and wrong are those of the run without the rule."))
    parts = ("right", "correct"), ("wrong", "incorrect")
    headings = ["run"] + [f"{word}: {what}" for word, _ in parts for what in ("n", "tokens without", "with", "saved")]
    rows = []
    for run in ruled:
        row = [run["name"]]
        for _, key in parts:
            part = run["against_off"][key]
            row += [str(part["saved"].n)]
            row += [number(part["before"], 0), number(part["after"], 0), percent(part["saved"])]
        rows.append(row)
    document.add(Table(headings, rows))


def _loss(document: Document, runs: list[dict]) -> None:
    measured = [run for run in runs if run["lost_bits"]]
    document.add(Heading(3, "Information loss"))
    if not measured:
        document.add(Paragraph("Left out: no run has measured it (`lil-ops eval --measure-loss`)."))
        return
    document.add(Paragraph("As the policy tells it: Quest by minmax at most so much, by meanstd as an estimate."))
    rows = [[run["name"], str(run["lost_bits"].n), number(run["lost_bits"], 4)] for run in measured]
    document.add(Table(["run", "n", "bits lost a step, mean"], rows))


def _sensitivity(document: Document, numbers: dict, figures: Figures) -> None:
    document.add(Heading(3, "Guardian's interval and threshold"))
    rows = numbers["sensitivity"]
    if not rows:
        document.add(Paragraph("Left out: there is no run without a stop rule, which a replay needs."))
        return
    document.add(
        Paragraph(
            "By replay: the rule looks at the recorded tokens and ends them where it would have. An answer counts if "
            "it was given before. report.json has each run alone."
        )
    )
    _figure(document, figures.sensitivity(), "Left: tokens saved. Right: what that does to the right answers.")
    together = [row for row in rows if row["runs"] in ("dense", "all sparse runs")] or rows
    headings = ["runs", "f", "t", "n", "ended by the rule", "tokens saved", "right answers without", "change in points"]
    document.add(
        Table(
            headings,
            [
                [
                    row["runs"],
                    str(row["interval"]),
                    f"{row['threshold']:g}",
                    str(row["saved"].n),
                    percent(row["stopped"]),
                    percent(row["saved"]),
                    percent(row["before"]),
                    points(row["difference"]),
                ]
                for row in together
            ],
        )
    )


def _figure(document: Document, name: str | None, caption: str) -> None:
    if name:
        document.add(Figure(name, caption))


def number(estimate: Estimate, digits: int) -> str:
    if math.isnan(estimate.value):
        return "-"
    value, low, high = (f"{each:.{digits}f}" for each in estimate[:3])
    return f"{value} [{low}, {high}]"


def percent(estimate: Estimate) -> str:
    if math.isnan(estimate.value):
        return "-"
    value, low, high = (f"{100 * each:.0f}" for each in estimate[:3])
    return f"{value} % [{low}, {high}]"


def points(estimate: Estimate) -> str:
    if math.isnan(estimate.value):
        return "-"
    value, low, high = (f"{each:+.1f}" if each else "0.0" for each in (round(100 * each, 1) for each in estimate[:3]))
    return f"{value} [{low}, {high}]"


def seconds(estimate: Estimate) -> str:
    if math.isnan(estimate.value):
        return "-"
    factor, unit = (1, "s") if estimate.value >= 1 else (1000, "ms")
    value, low, high = (f"{each * factor:.3g}" for each in estimate[:3])
    return f"{value} {unit} [{low}, {high}]"


def _plain(value):
    """For JSON: estimates as objects, and null for what is no number."""
    if isinstance(value, Estimate):
        return _plain(value._asdict())
    if isinstance(value, dict):
        return {key: _plain(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value

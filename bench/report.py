#!/usr/bin/env python3
"""docs/performance.md from bench/results/*.json: bench/report.py"""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable
from pathlib import Path

from report_engine import engine_lines, jct_lines, layer_lines, linears_lines, memory_lines, note_lines
from report_field import field_lines
from report_loss import loss_lines

BENCH = Path(__file__).resolve().parent
REPORT = BENCH.parent / "docs" / "performance.md"

ASKED = """*Asked*: a target set before the work was begun."""

CPU = """## CPU

{cpu}, {threads} threads, {isa}; torch {torch}; {date}, commit {commit}; `{command}`. Medians. *Share of read*: bytes
that must be read, over the time, over the bandwidth of a 512 MB read measured just before. *Against lil*: the variant's
time over ours, same run.

Unless said otherwise: bf16, 8 KV heads x group 4, head_dim 128, page 16, context 32768, budget 2048.

| case | variant | median | GB/s | share of read | against lil |
| --- | --- | ---: | ---: | ---: | ---: |"""

CUDA = """## CUDA

{device}, {read_gb_s} GB/s read (a bf16 sum over 2 GB); torch {torch}, CUDA {cuda}; {date}, commit {commit};
`{command}`. bf16, head_dim 128, page 16, budget 1024; shape A has 32 query and 8 KV heads, B 12 and 2. Microseconds of
one layer: medians of CUDA-graph replays over distinct layers (`layers` in the JSON; together the step touches three
times the L2; attend, score or select alone may touch less than that). *Limit*: bytes that must be read, over the read
bandwidth. *2.00x*: what a column compares with takes twice our time. **Bold**: misses what was asked, or is below 1x
where nothing was.{peers}"""

NO_PEERS = " No peer was installed in this run."

STEP = """Append, score, select, attend{loss}. *Dense peer*: FlashInfer's best mode. *Pipeline*: the peers' fastest
scoring, top-k and attention over 1024 tokens, added up. Neither appends."""
FLOAT8_SUMMARIES = """The same step over float8 page summaries beside the bf16 cache: scoring reads half the bytes,
and its bounds are a little looser. Against the same peers, and with the same figures asked."""
ATTEND = "Attention alone over 1024 and over 2048 selected tokens. *Peer*: the fastest for 1024."
DENSE = "The same kernel over the whole sequence. *Peer*: FlashInfer's best mode. Asked: 0.97x."
SHORT = "The step reads 1024 tokens at most, dense all; append + dense does what the step replaces. Asked: 0.97x."
FP8 = "float8 keys, values and summaries against bf16. Asked: 1.6x for attention at batch 32."
OPERATORS = """*Four*: append, score, select and attend as calls of their own. *Loss adds*: asked, at most 3 % of the
step. *With float8*: the same of float8 summaries."""
PEERS = "Every peer, against our variant that does the same."
LZ77 = """## LZ77 on CUDA

{device}; torch {torch}; {date}, commit {commit}; `{command}`. `lz77_append`, whole calls, microseconds. One token: the
mean of 1280 steps after a history of 64k; *cold*: before each step something else had the L2 cache. 250 tokens: after
64k too. From scratch: emptying the state is in it.

| case | tokens | us | asked |
| --- | --- | ---: | ---: |"""

DECISIONS = """### Decisions of the policies

All that a policy does in a step but the attention: write, select, observe. One layer of shape A (32 query and 8 KV
heads of 128), bf16, page 16, budget 1024, {batch}; {how} LessIsMore: the mean of a model's 30 layers behind the
dense ones, two of which select. *%*: of dense attention over the same context. Asked: {asked}. **Bold**: misses it."""
STEPS = "the mean of up to 128 steps, one after another."
REPLAYS = """medians of CUDA-graph replays over distinct layers.
Quest does all of a step in `sparse_decode_step`: its row is that, less the attention alone over the pages that it
reads, launches likewise (`fused_us` and `attention_us` in the JSON). *Added*: to a plain append, at 32768, batch 1."""
MOST_SHARE, MOST_ADDED, ASKED_CONTEXT = 0.15, 10, 32768

LONG_DECODE = """### Long decodes

A tiny random model (one layer, 4 query and 2 KV heads of 64, float32), budget {budget}, with a Guardian: the median
time between tokens over {window} tokens from the {window}th on, and over the last {window} of {tokens} of another run,
a step of either in turn. *Process*: resident memory before and after the tokens between. *Cache*: the most that was in
use. Asked of those that are bounded: 1.05x. **Bold**: misses it.

| policy | early | late | late / early | process, early | late | cache |
| --- | ---: | ---: | ---: | ---: | ---: | ---: |"""

STOP = """### The cost of the early stop

SmolLM2-135M, Quest with a budget of {budget}, and a Guardian or none: a step of either in turn. *Stop*: what they
differ by behind the choice of the tokens, and `lz77_append`, which both have. *Behind*: all of that part, end of
sequence and bookkeeping included. In the processor's time on one thread, which a busy machine does not prolong; two
threads halve the rest of a step at best, and so double the share at most. Medians over steps. Asked: under 1 %.
**Bold**: misses it.

| dtype | step | stop | share | lz77_append | check | behind |
| --- | ---: | ---: | ---: | ---: | ---: | ---: |"""
MOST_STOP = 0.01

# What issue 3 asks: us of the step, dense over step, pipeline over step; us of attention over 1024 and 2048 tokens.
ASKED_STEP = {
    ("A", 1, 32768): (12, 4.7, 3.4),
    ("A", 1, 131072): (24, 7.9, 4.4),
    ("A", 8, 32768): (46, 8.0, 4.2),
    ("A", 32, 32768): (165, 8.5, 4.3),
    ("B", 1, 32768): (9, 2.6, 3.0),
    ("B", 32, 32768): (45, 8.0, 6.0),
}
MOST_LOSS_ADDS = 0.03
ASKED_ATTEND = {("A", 1): (6.0, 7.5), ("A", 8): (16.0, 27.0), ("A", 32): (50.0, 94.0)}
ASKED_LZ77 = {"one token, batch": 10, "250 tokens, batch 256": 2000, "128k tokens from scratch": 3000}  # us
NARROW = ", float8 summaries"  # ends the names of such variants
SHORT_CONTEXT = 4096  # up to here a case is about short contexts


def cpu_lines(result: dict) -> list[str]:
    lines = [CPU.format(**result, **result["machine"], **result["versions"])]
    tables: dict[str, list[dict]] = {}
    for case, rows in result["cases"].items():
        if "table" in rows[0]:
            tables.setdefault(rows[0]["table"], []).extend(rows)
            continue
        ours = next((row["median_us"] for row in rows if row["variant"] == "lil"), None)
        for row in rows:
            ratio = f"{row['median_us'] / ours:.2f}x" if ours and row["variant"] != "lil" else ""
            share = f"{row['share_of_read']:.0%}" if "share_of_read" in row else ""
            rate = f"{row['gb_s']:.1f}" if "gb_s" in row else ""
            lines.append(f"| {case} | {row['variant']} | {_time(row['median_us'])} | {rate} | {share} | {ratio} |")
    if result["again"]:
        parts = (f"{case} (commit {commit})" for case, commit in result["again"].items())
        lines += ["", f"Run again by themselves: {'; '.join(parts)}."]
    lines += _cpu_decisions(tables.get("decisions", [])) + _long_decodes(tables.get("long decode", []))
    return lines + _stop_lines(tables.get("stop", []))


def _cpu_decisions(rows: list[dict]) -> list[str]:
    if not rows:
        return []
    contexts = sorted({row["context"] for row in rows})
    text = DECISIONS.format(batch="batch 1", how=STEPS, asked="15 % at 32768")
    lines = ["", text, "", f"| policy | {_cells(contexts)} |", "| --- |" + " ---: |" * len(contexts)]
    for name in dict.fromkeys(row["variant"] for row in rows):
        found = {row["context"]: row for row in rows if row["variant"] == name}
        cells = [_decision(found[context]["median_us"], found[context]["dense_us"], context) for context in contexts]
        lines.append(f"| {name} | {_cells(cells)} |")
    for name, key in (("a plain append", "append_us"), ("dense attention", "dense_us")):
        medians = [statistics.median(row[key] for row in rows if row["context"] == context) for context in contexts]
        lines.append(f"| *{name}* | {_cells([_time(us) for us in medians])} |")
    return lines


def _decision(us: float, dense: float, context: int) -> str:
    text = f"{_time(us)}, {_percent(us / dense)}"
    return f"**{text}**" if context == ASKED_CONTEXT and us > MOST_SHARE * dense else text


def _long_decodes(rows: list[dict]) -> list[str]:
    if not rows:
        return []
    lines = ["", LONG_DECODE.format(**rows[0])]
    for row in rows:
        ratio = row["late_us"] / row["early_us"]
        ratio_text = f"{ratio:.2f}x" if ratio <= 1.05 or row["variant"] == "full" else f"**{ratio:.2f}x**"
        times = [_time(row[key]) for key in ("early_us", "late_us")]
        memory = [None if row[key] is None else f"{row[key]} MB" for key in ("early_mb", "late_mb")]
        lines.append(f"| {row['variant']} | {_cells([*times, ratio_text, *memory])} | {row['cache_kb']} KB |")
    return lines


def _stop_lines(rows: list[dict]) -> list[str]:
    if not rows:
        return []
    lines = ["", STOP.format(**rows[0])]
    for row in rows:
        share = _percent(row["share"], 2)
        share = f"**{share}**" if row["share"] >= MOST_STOP else share
        step, stop, *parts = (_time(row[f"{key}_us"]) for key in ("step", "median", "lz77", "check", "behind"))
        lines.append(f"| {row['variant']} | {_cells([step, stop, share, *parts])} |")
    return lines


def policies_lines(result: dict) -> list[str]:
    """Decisions on CUDA: a row a policy."""
    cases = result["cases"]
    asked = "15 % at 32768, batch 8; 10 us added"
    text = DECISIONS.format(batch="microseconds", how=REPLAYS, asked=asked)
    where = f"{result['device']}; torch {result['versions']['torch']}; {result['date']}, commit {result['commit']}."
    columns = [f"batch {case['batch']}, {case['context']}" for case in cases]
    lines = [text, "", where, "", f"| policy | launches | added | {_cells(columns)} |"]
    lines.append("| --- | ---: | ---: |" + " ---: |" * len(cases))
    for name in cases[0]["policies"]:
        cells, added, launches, note = [], None, None, ""
        for case in cases:
            row, at_asked = case["policies"].get(name, {}), case["context"] == ASKED_CONTEXT
            if "us" not in row:
                cells.append(None)
                continue
            misses = at_asked and case["batch"] == 8 and row["us"] > MOST_SHARE * case["dense_us"]
            cell = f"{row['us']}, {_percent(row['us'] / case['dense_us'])}"
            cells.append(f"**{cell}**" if misses else cell)
            note = f" ({row['note']})" if "note" in row else ""
            if at_asked and case["batch"] == 1:
                added = _at_most(round(row["us"] - case["append_us"], 2), MOST_ADDED)
                launches = row["launches"]
        lines.append(f"| {name}{note} | {_cells([launches, added, *cells])} |")
    for name, key in (("a plain append", "append_us"), ("dense attention", "dense_us")):
        lines.append(f"| *{name}* | | | {_cells([case[key] for case in cases])} |")
    return lines


def cuda_lines(result: dict) -> list[str]:
    cases = result["cases"]
    peers = any(_peers(case) for case in cases)
    lines = [CUDA.format(**result, **result["versions"], peers="" if peers else NO_PEERS), *note_lines(result)]
    long = [case for case in cases if case["context"] > SHORT_CONTEXT]
    short = [case for case in cases if case["context"] <= SHORT_CONTEXT]
    loss = ", loss" if all("lil step with loss" in case["us"] for case in long) else ""
    columns = "whole step | limit | dense peer / step | pipeline / step | asked"
    lines += _table("The step", STEP.format(loss=loss), columns, map(_step, long))
    narrow = [case for case in long if f"lil step{NARROW}" in case["us"]]
    columns = "score | gain | whole step | gain | limit | dense peer / step | pipeline / step | asked"
    lines += _table("The step, float8 summaries", FLOAT8_SUMMARIES, columns, map(_narrow_step, narrow))
    columns = "1024 | asked | limit | peer | peer / 1024 | 2048 | asked | limit"
    lines += _table("Attention", ATTEND, columns, map(_attend, long))
    lines += _table("Dense", DENSE, "dense | limit | peer | peer / dense", map(_dense, cases))
    columns = "step | append + dense | it / step | dense peer | it / step"
    lines += _table("Short contexts", SHORT, columns, map(_short, short))
    columns = "attend 1024 | fp8 | gain | dense | fp8 | gain | step | fp8 | gain"
    lines += _table("fp8", FP8, columns, map(_fp8, (c for c in cases if "lil step, fp8" in c["us"])))
    columns = "append | score | limit | select | attend 1024 | four | step | step with loss | loss adds | with float8"
    lines += _table("Operators", OPERATORS, columns, map(_operators, cases))
    rows = (row for case in cases for row in _peers(case))
    lines += _table("Peers", PEERS, "peer | us | peer / ours", rows, text_columns=1)
    return lines


def lz77_lines(result: dict) -> list[str]:
    lines = [LZ77.format(**result, **result["versions"])]
    for row in result["rows"]:
        asked = next((us for case, us in ASKED_LZ77.items() if row["case"].startswith(case)), None)
        lines.append(f"| {row['case']} | {row['tokens']} | {_cells([_at_most(row['us'], asked), asked])} |")
    return lines


def _table(title: str, text: str, columns: str, rows: Iterable[list], text_columns: int = 0) -> list[str]:
    """Nothing where there are no rows. A row begins with its case."""
    rows = [f"| {row[0]['shape']}, {row[0]['batch']}, {row[0]['context']} | {_cells(row[1:])} |" for row in rows]
    if not rows:
        return []
    numbers = columns.count("|") + 1 - text_columns
    rule = "| --- |" + " --- |" * text_columns + " ---: |" * numbers
    return ["", f"### {title}", "", text, "", f"| shape, batch, context | {columns} |", rule, *rows]


def _cells(values: list) -> str:
    return " | ".join("" if value is None else str(value) for value in values)


def _step_us(case: dict, suffix: str = "") -> float:
    """With the loss where it was measured."""
    return case["us"].get(f"lil step with loss{suffix}", case["us"][f"lil step{suffix}"])


def _step(case: dict) -> list:
    return [case, *_step_against(case, _step_us(case), case["limit"]["score"])]


def _narrow_step(case: dict) -> list:
    score, step = case["us"][f"lil score{NARROW}"], _step_us(case, NARROW)
    us, *against = _step_against(case, step, case["limit"]["score"] / 2)
    return [case, score, _over(case["us"]["lil score"], score), us, _over(_step_us(case), step), *against]


def _step_against(case: dict, step: float, score_limit: float) -> list:
    us, dense, pipeline = ASKED_STEP.get(_key(case), (None, 1, 1))
    asked = us and f"{us} us, {dense}x, {pipeline}x"
    limit = round(case["limit"]["attend 1024"] + score_limit, 2)
    against = [_over(case.get("dense_peer"), step, dense), _over(case.get("pipeline"), step, pipeline)]
    return [_at_most(step, us), limit, *against, asked]


def _attend(case: dict) -> list:
    us, limit = case["us"], case["limit"]["attend 1024"]
    peer = min((us[name] for name in us if "1024" in name and not name.startswith("lil ")), default=None)
    asked, asked_wide = ASKED_ATTEND.get(_key(case)[:2], (None, None))
    narrow, wide = us["lil attend 1024"], us.get("lil attend 2048")
    row = [case, _at_most(narrow, asked), asked, limit, peer, _over(peer, narrow)]
    return [*row, _at_most(wide, asked_wide), asked_wide, round(2 * limit, 2)]


def _dense(case: dict) -> list:
    us, peer = case["us"]["lil dense"], case.get("dense_peer")
    return [case, us, case["limit"]["dense"], peer, _over(peer, us, 0.97)]


def _short(case: dict) -> list:
    us, peer = case["us"], case.get("dense_peer")
    step, dense = us["lil step"], round(us["lil append"] + us["lil dense"], 2)
    return [case, step, dense, _over(dense, step, 0.97), peer, _over(peer, step, 0.97)]


def _fp8(case: dict) -> list:
    row = [case]
    for name in ("lil attend 1024", "lil dense", "lil step"):
        us, narrow = case["us"][name], case["us"][f"{name}, fp8"]
        row += [us, narrow, _over(us, narrow, 1.6 if "attend" in name and case["batch"] == 32 else 1)]
    return row


def _operators(case: dict) -> list:
    names = ("append", "score", "select", "attend 1024", "step, four operators", "step", "step with loss")
    us = [case["us"].get(f"lil {name}") for name in names]
    narrow = (case["us"].get(f"lil {name}{NARROW}") for name in ("step", "step with loss"))
    return [case, *us[:2], case["limit"]["score"], *us[2:], _added(*us[-2:]), _added(*narrow)]


def _peers(case: dict) -> list[list]:
    us = case["us"]
    peers = [name for name in us if not name.startswith("lil ")]
    return [[case, name, us[name], _over(us[name], us[f"lil {_counterpart(name)}"])] for name in peers]


def _key(case: dict) -> tuple[str, int, int]:
    return case["shape"], case["batch"], case["context"]


def _over(other: float | None, ours: float, least: float = 1) -> str | None:
    if other is None:
        return None
    return f"{other / ours:.2f}x" if other / ours >= least else f"**{other / ours:.2f}x**"


def _added(step: float | None, with_loss: float | None) -> str | None:
    if with_loss is None:
        return None
    share = with_loss / step - 1
    return _percent(share) if share <= MOST_LOSS_ADDS else f"**{_percent(share)}**"


def _percent(share: float, places: int = 1) -> str:
    return f"{100 * share:.{places}f} %"


def _at_most(us: float | None, most: float | None) -> str | float | None:
    return us if us is None or most is None or us <= most else f"**{us}**"


def _counterpart(peer: str) -> str:
    """Our variant that does what the peer does."""
    kinds = {"dense": "dense", "1024": "attend 1024", "score": "score", "top": "select"}
    return next(ours for word, ours in kinds.items() if word in peer)


def _time(us: float) -> str:
    return f"{us:.1f} us" if us < 1000 else f"{us / 1000:.2f} ms"


def report() -> None:
    lines = ["# Performance", "", "Generated from `bench/results/*.json` by `bench/report.py`; do not edit.", "", ASKED]
    makers = {"cpu": cpu_lines, "cuda": cuda_lines, "policies_cuda": policies_lines, "lz77_cuda": lz77_lines}
    makers |= {
        "linears_cuda": linears_lines,
        "layer_cuda": layer_lines,
        "layer_memory": memory_lines,
        "engine": engine_lines,
        "jct": jct_lines,
        "jct_30k": jct_lines,
        "loss": loss_lines,
        "loss_qwen": loss_lines,
        "loss_cuda": loss_lines,
        "loss_qwen_cuda": loss_lines,
    }
    makers |= {"field": field_lines}
    for name, make in makers.items():
        result = BENCH / "results" / f"{name}.json"
        if result.exists():
            lines += ["", *make(json.loads(result.read_text()))]
    REPORT.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    report()

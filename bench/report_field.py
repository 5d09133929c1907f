"""The section "Against the field" of docs/performance.md, from bench/results/field.json."""

from __future__ import annotations

import textwrap

TIMES = ("tbt_ms", "tbt_mean_ms")

HEAD = """{cpu}; threads: {threads}; {date}, commit {commit}; `{command}`. The same float32 weights, token ids and
budgets, greedy, in one run; a process for each environment: {versions}."""

HOW = """
*Tokens/s*: one over the median time between tokens of a sequence alone; its prefill is not counted. *Mean*: one over
the mean, which has the steps that compress in it, where a median of every 32nd has not. *KV*: that sequence's cache at
its largest between two steps: ours in whole pages of 16 tokens, with the summaries of pages; theirs the key and value
tensors. Copies that last for a part of a step are not counted. *State*: what a method keeps beside the cache: our
policies' positions and priorities, kvpress's buffer of hidden states, R-KV's of queries. *RSS*: the process at its
largest, which is weights and libraries for the most part. *Length*: mean tokens of an output. *Same*: outputs with the
answer that our dense decoding gives; without answers: the mean share of an output before the first token that differs.
*Right*: outputs with the true answer.

What is equal: keys keep the positions they were written with, and new tokens count on. What is not:

- kvpress compresses every so many steps, to its `target_size`. *Every step*: to one less than the budget, so that with
  the new token its heads read as many as ours. *Every n*: to the budget, a quarter of it apart (its own proportion), so
  that in between it holds and reads up to a quarter more than ours.
- Our bounded policies and R-KV cut a prompt to the budget at once; kvpress's DecodingPress leaves it whole until the
  first compression.
- kvpress keeps a cache in the order of `topk`, that is of scores (its issue 173). StreamingLLMPress,
  ObservedAttentionPress and SnapKVPress go by places, as if that were the order of time: within a DecodingPress the
  first does not go on holding the first 4 and the last tokens, which `sink` does.
- `tova` and TOVAPress have the same rule, but that TOVAPress never lets go of the newest token.
- `h2o` adds up attention over all steps and keeps the recent half. ObservedAttentionPress, which needs eager attention,
  sees within a DecodingPress the weights of the step that compresses alone, divided by the places behind.
- `snapkv` cuts the prompt and holds all that is generated: dense where the prompt fits. SnapKVPress within a
  DecodingPress cuts everything, by the last queries (half an interval), all of them turned to the present position.
- KeyDiffPress stands beside `rkv` as kvpress's nearest: it lets go of keys near the mean key, without attention.
  KnormPress has no counterpart here. `quest` holds everything; the budget bounds what it reads."""

TABLE = """| environment | method | budget | tokens/s | mean | KV | state | RSS | length | ended | same | right |
| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |"""

PAIRS = """Ours over theirs, each beside its counterparts at the same budget; memory is KV and state. **Bold**: ours is
behind.

| budget | ours | theirs | tokens/s | mean | memory | same | right |
| ---: | --- | --- | ---: | ---: | ---: | ---: | ---: |"""


def field_lines(result: dict) -> list[str]:
    sides = {side: found for task in result["tasks"] for side, found in task["versions"].items()}
    versions = "; ".join(f"{side} ({_versions(found)})" for side, found in sides.items())
    head = HEAD.format(**result | result["machine"], versions=versions)
    lines = ["## Against the field", "", *textwrap.wrap(head, 120, break_on_hyphens=False), *HOW.splitlines()]
    for task in result["tasks"]:
        rows = task["rows"]
        title = {"problems": "Problems with answers", "smollm2": "SmolLM2-135M-Instruct"}[task["name"]]
        size = f"{task['parameters'] / 1e6:.1f} million parameters, {task['layers']} layers"
        text = (
            f"{size}; {rows[0]['problems']} prompts of {task['prompt']} tokens, outputs of {task['new']} at most. "
            f"Time and memory: {task['timed']} of them alone, {task['timed_new']} tokens each."
        )
        lines += ["", f"### {title}", "", *textwrap.wrap(text, 120)]
        lines += ["", *(f"Left out: {line}." for line in task["left_out"])] if task["left_out"] else []
        lines += ["", *TABLE.splitlines(), *map(_row, rows), "", *PAIRS.splitlines(), *_pairs(rows)]
    return lines


def _versions(found: dict) -> str:
    return ", ".join(f"{name} {value}" for name, value in found.items() if name not in ("isa", "python"))


def _row(row: dict) -> str:
    cells = [row["side"], row["method"], row["budget"], *(f"{1e3 / row[name]:.1f}" for name in TIMES)]
    cells += [_kib(row["kv_bytes"]), _kib(row["state_bytes"]), _mib(row["rss_bytes"]), f"{row['length']:.0f}"]
    cells += [row["ended"], _same(row), row.get("right")]
    return _cells(cells)


def _pairs(rows: list[dict]) -> list[str]:
    ours = [row for row in rows if row["side"] == "lil_ops"]
    theirs = [row for row in rows if row["side"] != "lil_ops"]
    return [_pair(our, row) for our in ours for row in theirs if _beside(our) == _beside(row)]


def _beside(row: dict) -> tuple:
    return row["beside"], row["budget"]


def _pair(our: dict, row: dict) -> str:
    speeds = [row[name] / our[name] for name in TIMES]
    memory = (our["kv_bytes"] + our["state_bytes"]) / (row["kv_bytes"] + row["state_bytes"])
    cells = [our["budget"], our["method"], f"{row['side']} {row['method']}"]
    cells += [_bold(f"{speed:.2f}x", speed < 1) for speed in speeds]
    cells += [_bold(f"{memory:.2f}x", memory > 1), _against("same_answer" if "right" in our else "agree", our, row)]
    return _cells([*cells, _against("right", our, row) if "right" in our else None])


def _cells(cells: list) -> str:
    return "| " + " | ".join("" if cell is None else str(cell) for cell in cells) + " |"


def _against(name: str, our: dict, row: dict) -> str:
    both = [f"{100 * one[name]:.0f}%" if name == "agree" else f"{one[name]}" for one in (our, row)]
    return _bold(" : ".join(both), our[name] < row[name])


def _same(row: dict) -> str:
    return f"{row['agree']:.0%}" if "same_answer" not in row else f"{row['same_answer']}"


def _bold(text: str, behind: bool) -> str:
    return f"**{text}**" if behind else text


def _kib(size: int) -> str:
    return f"{size / 1024:.0f} KiB"


def _mib(size: int | None) -> str | None:
    return size and f"{size / 2**20:.0f} MiB"

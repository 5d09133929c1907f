"""The section "Against the field" of docs/performance.md, from bench/results/field.json."""

from __future__ import annotations

import textwrap

HEAD = """{cpu}; threads: {threads}; {date}, commit {commit}; `{command}`. The same float32 weights, token ids and
budgets, greedy, in one run; a process for each environment: {versions}."""

HOW = """
*Tokens/s*: one over the median time between tokens of a sequence alone; its prefill is not counted. *KV*: that
sequence's cache at its largest between two steps: ours in whole pages of 16 tokens, with the summaries of pages;
theirs the key and value tensors. Copies that last for a part of a step are not counted. *State*: what a method keeps
beside the cache: our policies' positions and priorities, kvpress's buffer of hidden states, R-KV's of queries. *RSS*:
the process at its largest, which is weights and libraries for the most part. *Length*: mean tokens of an output.
*Same*: outputs with the answer that our dense decoding gives; without answers: the mean share of an output before the
first token that differs. *Right*: outputs with the true answer.

What is equal: keys keep the positions they were written with, and new tokens count on. What is not:

- kvpress compresses every so many steps, to its `target_size`. *Every step*: to one less than the budget, so that with
  the new token its heads read as many as ours. *Every n*: to the budget, a quarter of it apart (its own proportion), so
  that in between it holds and reads up to a quarter more than ours.
- Our bounded policies and R-KV cut a prompt to the budget at once; kvpress's DecodingPress leaves it whole until the
  first compression.
- kvpress keeps a cache in the order of `topk`, that is of scores. StreamingLLMPress and ObservedAttentionPress score by
  place, as if it were the order of time: within a DecodingPress the first does not go on holding the first 4 and the
  last tokens, which `sink` does.
- `tova` and TOVAPress have the same rule, but that TOVAPress never lets go of the newest token.
- `h2o` adds up attention over all steps and keeps the recent half. ObservedAttentionPress, which needs eager attention,
  sees within a DecodingPress the weights of the step that compresses alone, divided by the places behind.
- `snapkv` cuts the prompt and holds all that is generated. SnapKVPress within a DecodingPress cuts everything, by the
  last queries (half an interval), all of them turned to the present position.
- KeyDiffPress stands beside `rkv` as kvpress's nearest: it lets go of keys near the mean key, without attention.
  KnormPress has no counterpart here. `quest` holds everything; the budget bounds what it reads."""

TABLE = """| environment | method | budget | tokens/s | KV | state | RSS | length | ended | same | right |
| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |"""

PAIRS = """Ours over theirs, each beside its counterparts at the same budget; memory is KV and state. **Bold**: ours is
behind.

| budget | ours | theirs | tokens/s | memory | same | right |
| ---: | --- | --- | ---: | ---: | ---: | ---: |"""


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
    cells = [row["side"], row["method"], row["budget"], f"{row['tokens_per_s']:.1f}"]
    cells += [_kib(row["kv_bytes"]), _kib(row["state_bytes"]), _mib(row["rss_bytes"]), f"{row['length']:.0f}"]
    cells += [row["ended"], _same(row), row.get("right")]
    return "| " + " | ".join("" if cell is None else str(cell) for cell in cells) + " |"


def _pairs(rows: list[dict]) -> list[str]:
    lines = []
    for our in rows:
        if our["side"] != "lil_ops":
            continue
        beside = [row for row in rows if row["side"] != "lil_ops" and row["beside"] == our["beside"]]
        for row in beside:
            if row["budget"] != our["budget"]:
                continue
            memory = (our["kv_bytes"] + our["state_bytes"]) / (row["kv_bytes"] + row["state_bytes"])
            speed = our["tbt_ms"] and row["tbt_ms"] / our["tbt_ms"]
            theirs = f"{row['side']} {row['method']}"
            cells = [our["budget"] or "", our["method"], theirs, _bold(f"{speed:.2f}x", speed < 1)]
            same = "same_answer" if "right" in our else "agree"
            cells += [_bold(f"{memory:.2f}x", memory > 1), _against(same, our, row)]
            cells += [_against("right", our, row) if "right" in our else ""]
            lines.append("| " + " | ".join(map(str, cells)) + " |")
    return lines


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

"""docs/performance.md: linear layers, a layer, its memory, the engine and end to end on CUDA, from
bench/results/linears_cuda.json, layer_cuda.json, layer_memory.json, engine.json and jct.json."""

from __future__ import annotations

import itertools

LINEARS = """## Linear layers of a decode step on CUDA

{device}, {read_gb_s} GB/s read; torch {torch}; {date}, commit {commit}; `{command}`. bf16, microseconds; each layer
with what `decode_linear` takes along: the norm before qkv, gate and up, and the head; the gate; the addition behind
output and down. *torch*: the same by torch.compile. *cuBLAS*: the product alone. Floor: the weight over the bandwidth.
Bold: slower than torch.

| model, layer, rows | lil | floor | share | torch | torch / lil | cuBLAS |
| --- | ---: | ---: | ---: | ---: | ---: | ---: |"""
LAYER = """## A decode layer on CUDA

{device}, {read_gb_s} GB/s read; torch {torch}; {date}, commit {commit}; `{command}`. bf16, 32k tokens, Quest over 1024
of them: a layer of four `decode_linear` and a `sparse_decode_step`, 16 of them in a graph. Microseconds. *Floor*: the
bytes over this run's bandwidth, which differs by some 4 % from run to run. *Kernels*: in their order, how long after
the one ahead each has ended.

| model, batch | layer | floor | layer / floor | kernels |
| --- | ---: | ---: | ---: | --- |"""
MEMORY = """## Memory in a decode layer on CUDA

{device}; torch {torch}; {date}, commit {commit}; `{command}`. The layers of the table above, sampled by Nsight Compute,
which slows them a little: microseconds of a layer in which memory reads at so large a share of its peak.

| model, batch | layer | {bands} |
| --- | ---: | {rulers} |"""
ENGINE = """## The engine on CUDA

{device}, {read_gb_s} GB/s read; torch {torch}, transformers {transformers}; {date}, commit {commit}; `{command}`.
Random bf16 weights, Quest with a budget of {budget} (two layers dense) and a Guardian that never stops. Microseconds a
step. *Engine*: one CUDA graph; *compiled*: with the model's part compiled; *no graph*: launched from the host.
*Floor*: the bytes that must be read, over the bandwidth. *Kernels*: how long at least one of them runs (they begin
before the one ahead has ended), and how many. *Stop*: `lz77_append` and `guardian_check`. *Gap*: the longest time in
which no kernel runs. transformers: `generate` with sdpa, dense; *static*: static cache, compiled."""
NOTE = """
Asked: 1.2x of the floor for the Qwen shape, 3 % over the kernels, 0.5 % for the stop; transformers' static at least 2x
of ours at batch 1 and 5x at batch 8. Bold misses."""
END_TO_END = """## End to end on CUDA, {problems} sequences

{model}, bf16, {device}; torch {torch}, transformers {transformers}; {date}, commit {commit}; `{command}`.
GSM8K problems behind solved ones, one batch; greedy. TTFT: all prompts of the batch. JCT: the mean over the problems,
each from the batch's start to its own last token; the first of ours in a process also pays for what the later ones find
warm. *Ended*: before the limit of new tokens. *Transformers by it*: its JCT over this one."""
NAMES = {"generate": "transformers", "static": "transformers, static"}


ANOTHER_RUN = """Another run, not to be compared with the one above: `{command}`; commit {commit}."""


def note_lines(run: dict) -> list[str]:
    """What was found out about a run's figures when it was over, written into its result by hand."""
    return ["", run["note"]] if "note" in run else []


def engine_lines(result: dict) -> list[str]:
    shown, *others = result["runs"]
    lines = [ENGINE.format(**shown, **shown["versions"]) + NOTE, "", *_table(shown), *note_lines(shown)]
    for run in others:
        lines += ["", ANOTHER_RUN.format(**run), "", *_table(run), *note_lines(run)]
    return lines


def linears_lines(result: dict) -> list[str]:
    lines = LINEARS.format(**result, **result["versions"]).splitlines()
    for row in result["rows"]:
        ours, theirs = row["lil_us"], row["torch_us"]
        lines.append(
            f"| {row['model']}, {row['layer']}, {row['rows']} | {ours} | {row['floor_us']} | "
            f"{row['floor_us'] / ours:.0%} | {theirs} | {_bold(f'{theirs / ours:.2f}x', theirs < ours)} | "
            f"{row['cublas_us']} |"
        )
    return lines


def layer_lines(result: dict) -> list[str]:
    lines = LAYER.format(**result, **result["versions"]).splitlines()
    for row in result["rows"]:
        kernels = ", ".join(f"{name} {us}" for name, us in row["until_us"])
        name, over = f"{row['shape']}, {row['batch']}", row["us"] / row["floor_us"]
        lines.append(f"| {name} | {row['us']} | {row['floor_us']} | {over:.2f}x | {kernels} |")
    return lines


def memory_lines(result: dict) -> list[str]:
    edges = [0, *result["edges"], 100]
    bands = [f"{low} to {high} %" for low, high in itertools.pairwise(edges)]
    table = " | ".join(bands), " | ".join(["---:"] * len(bands))
    lines = MEMORY.format(**result, **result["versions"], bands=table[0], rulers=table[1]).splitlines()
    for row in result["rows"]:
        lines.append(f"| {row['shape']}, {row['batch']} | {row['us']} | {' | '.join(map(str, row['bands_us']))} |")
    return lines


def _table(result: dict) -> list[str]:
    lines = [
        "| model, batch, context | how | step | floor | step / floor | kernels | step / kernels | stop | gap |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for row in result["rows"]:
        how = NAMES.get(row["how"], row["how"])
        name = f"{row['shape']}, {row['batch']}, {row['context'] // 1024}k"
        if "error" in row:
            lines.append(f"| {name} | {how} | {row['error']} | | | | | | |")
        elif "kernels" not in row:
            lines.append(f"| {name} | {how} | {row['tbt_us']}{_against(row, result)} | | | | | | |")
        else:
            over, busy = row["tbt_us"] / row["floor_us"], row["tbt_us"] / row["kernels_us"]
            share = row["stop_us"] / row["tbt_us"] if "stop_us" in row else None
            lines.append(
                f"| {name} | {how} | {row['tbt_us']} | {row['floor_us']} | {_bold(f'{over:.2f}x', over > 1.2)} | "
                f"{row['kernels_us']} in {row['kernels']} | {_bold(f'{busy:.2f}x', busy > 1.03)} | "
                f"{'' if share is None else _bold(f'{share:.2%}', share > 0.005)} | {row['gap_us']} |"
            )
    return lines


def _against(row: dict, result: dict) -> str:
    """This time by that of our compiled step."""
    for ours in result["rows"]:
        same = all(ours[key] == row[key] for key in ("shape", "batch", "context"))
        if same and ours["how"] == "compiled" and "tbt_us" in ours:
            ratio = row["tbt_us"] / ours["tbt_us"]
            return f" ({_bold(f'{ratio:.1f}x', ratio < (2 if row['batch'] == 1 else 5))} of compiled)"
    return ""


def _bold(text: str, missed: bool) -> str:
    return f"**{text}**" if missed else text


def jct_lines(result: dict) -> list[str]:
    problems = max(row.get("n", 0) for row in result["rows"])
    lines = [END_TO_END.format(**result, **result["versions"], problems=problems), ""]
    lines.append("| context | way | right | ended | tokens | TTFT, s | JCT, s | batch, s | transformers by it |")
    lines.append("| ---: | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |")
    peer = {row["context"]: row.get("jct_s") for row in result["rows"] if row["way"] == "transformers"}
    for row in result["rows"]:
        if "error" in row:
            lines.append(f"| {row['context']} | {row['way']} | {row['error']} | | | | | | |")
            continue
        ratio = f"{peer[row['context']] / row['jct_s']:.2f}x" if peer.get(row["context"]) else ""
        lines.append(
            f"| {row['context']} | {row['way']} | {row['right']} of {row['n']} | {row['ended']} | "
            f"{row['tokens']:.0f} | {row['ttft_s']:.2f} | {row['jct_s']:.2f} | {row['batch_s']:.2f} | {ratio} |"
        )
    return lines

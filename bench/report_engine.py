"""docs/performance.md, section "The engine on CUDA", from bench/results/engine.json."""

from __future__ import annotations

TEXT = """## The engine on CUDA

{device}, {read_gb_s} GB/s read; torch {torch}, transformers {transformers}; {date}, commit {commit}; `{command}`.
Random bf16 weights, contexts of {context}, Quest with a budget of {budget} (two layers dense) and a Guardian.
Microseconds a step. *Floor*: the bytes that must be read, over the bandwidth. *Kernels*: their sum, and how many.
Asked:
1.2x of the floor for the Qwen shape, and 3 % over the kernels."""


def engine_lines(result: dict) -> list[str]:
    lines = [TEXT.format(**result, **result["versions"]), ""]
    lines.append("| model, batch | graph | step | floor | step / floor | kernels | step / kernels |")
    lines.append("| --- | --- | ---: | ---: | ---: | ---: | ---: |")
    for row in result["rows"]:
        name, graph = f"{row['shape']}, {row['batch']}", "yes" if row["graph"] else "no"
        if "error" in row:
            lines.append(f"| {name} | {graph} | {row['error']} | {row['floor_us']} | | | |")
            continue
        over, busy = row["tbt_us"] / row["floor_us"], row["tbt_us"] / row["kernels_us"]
        over = f"**{over:.2f}x**" if over > 1.2 else f"{over:.2f}x"
        busy = f"**{busy:.2f}x**" if busy > 1.03 and row["graph"] else f"{busy:.2f}x"
        lines.append(
            f"| {name} | {graph} | {row['tbt_us']} | {row['floor_us']} | {over} | "
            f"{row['kernels_us']} in {row['kernels']} | {busy} |"
        )
    return lines

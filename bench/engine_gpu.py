#!/usr/bin/env python3
"""The engine's time between tokens on a GPU, beside what its bytes allow and transformers' own generate.

    bench/engine_gpu.py [--out FILE] [--shapes qwen-1.5b llama-8b]

This run stands first in FILE. When it is complete, it has taken the place of an earlier one of the same command on the
same device; others stay behind it.

Random bf16 models of the shapes of Qwen2.5-1.5B and Llama-3.1-8B, Quest with a budget of 1024 and a Guardian. Each case
in a process of its own: nothing of one, and least of all its profiler, is left to the next.
*Floor*: bytes of the weights, page summaries and selected keys and values that a step reads, over the measured read
bandwidth. *Kernels*, *stop*, *gap*: from torch's profiler, of steps behind those that are timed: how long at least one
of a step's kernels runs (each begins before the one ahead has ended), how long `lz77_append` or `guardian_check` does,
and the longest time in which none runs.
"""

from __future__ import annotations

import argparse
import itertools
import json
import multiprocessing
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch
import transformers as hf

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from facts import add_commit, facts
from timers import kernels_of, read_bandwidth

from lil_ops import Engine, Guardian, Request

BENCH = Path(__file__).resolve().parent
LONG, SHORT, BUDGET, PAGE, STEPS, PROFILED = 32768, 4096, 1024, 16, 100, 8
SHAPES = {
    "qwen-1.5b": (hf.Qwen2Config, dict(hidden_size=1536, intermediate_size=8960, num_hidden_layers=28,
        num_attention_heads=12, num_key_value_heads=2, vocab_size=151936, max_position_embeddings=40000,
        tie_word_embeddings=True)),
    "llama-8b": (hf.LlamaConfig, dict(hidden_size=4096, intermediate_size=14336, num_hidden_layers=32,
        num_attention_heads=32, num_key_value_heads=8, vocab_size=128256, max_position_embeddings=40000)),
}  # fmt: skip
# Batch, context, how: "engine" (graph), with the model compiled, without a graph;
# "generate" of transformers, with its growing cache, and with its static one and the model compiled.
CASES = {
    "qwen-1.5b": [
        (1, LONG, "compiled"), (1, LONG, "engine"), (1, LONG, "no graph"),
        (1, LONG, "generate"), (1, LONG, "static"),
        (8, LONG, "compiled"), (8, LONG, "engine"),
        (8, LONG, "generate"), (8, LONG, "static"),
        (64, SHORT, "compiled"),
    ],
    "llama-8b": [(1, LONG, "compiled"), (8, LONG, "compiled")],
}  # fmt: skip


def model_of(shape: str) -> torch.nn.Module:
    config, options = SHAPES[shape]
    with torch.device("cuda"):
        torch.set_default_dtype(torch.bfloat16)
        try:
            return hf.AutoModelForCausalLM.from_config(config(**options), attn_implementation="sdpa").eval()
        finally:
            torch.set_default_dtype(torch.float32)


def bytes_of_step(model: torch.nn.Module, batch: int, context: int) -> int:
    """What a step must read: all weights but the embedding's (a tied one is the head's), and what attention reads."""
    config = model.config
    weights = sum(p.numel() for p in model.parameters()) * 2
    if not config.tie_word_embeddings:
        weights -= config.vocab_size * config.hidden_size * 2
    width = config.num_key_value_heads * (config.hidden_size // config.num_attention_heads) * 2
    sparse = context // PAGE * 2 * width + BUDGET * 2 * width
    dense = 2 * context * width
    return weights + batch * (2 * dense + (config.num_hidden_layers - 2) * sparse)


def prompts(batch: int, context: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 1000, (batch, context - STEPS), generator=generator)


def engine(model: torch.nn.Module, batch: int, context: int, how: str, show: bool) -> dict:
    tokens = 3 * STEPS
    options = {
        "policy": "quest",
        "budget": BUDGET,
        "guardian": Guardian(threshold=0),
        "eos_token_id": [],
        "lag": 2 * tokens,
    }
    options |= {"graph": how != "no graph", "compile": how == "compiled"}
    with Engine(model, slots=batch, max_tokens=context + tokens, **options) as served:
        for row, prompt in enumerate(prompts(batch, context)):
            served.add(Request(prompt, max_new_tokens=tokens, seed=row))
        start = time.perf_counter()
        for _ in range(5):
            served.step()
        torch.cuda.synchronize()
        first = time.perf_counter() - start
        start = time.perf_counter()
        for _ in range(STEPS):
            served.step()
        torch.cuda.synchronize()
        seconds = (time.perf_counter() - start) / STEPS
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            for _ in range(PROFILED):
                served.step()
            torch.cuda.synchronize()
    kernels = kernels_of(profile)
    if show:
        print_step(kernels[-len(kernels) // PROFILED :])
    return {"tbt_us": round(seconds * 1e6, 1), "first_steps_s": round(first, 1)} | of_kernels(kernels)


def print_step(kernels: list[tuple[float, float, str]]) -> None:
    """The kernels in their order: when each begins and how long it runs, in microseconds. One that waits for those
    ahead begins before they end."""
    for start, end, name in kernels:
        print(f"{start - kernels[0][0]:8.1f} {end - start:7.1f}  {name[:100]}")


def gaps_between(kernels: list[tuple[float, float, str]]) -> list[float]:
    """How long none ran before each but the first."""
    ends = itertools.accumulate((end for _, end, _ in kernels), max)
    return [max(0, start - end) for (start, _, _), end in zip(kernels[1:], ends, strict=False)]


def busy(kernels: list[tuple[float, float, str]]) -> float:
    """How long at least one of them ran: one that begins early waits for the one ahead."""
    if not kernels:
        return 0
    return max(end for _, end, _ in kernels) - kernels[0][0] - sum(gaps_between(kernels))


def of_kernels(kernels: list[tuple[float, float, str]]) -> dict:
    """Microseconds of a step, and the longest gap; profiled steps are the last of a longer row."""
    stop = [kernel for kernel in kernels if "lz77" in kernel[2].lower() or "guardian" in kernel[2]]
    gaps = gaps_between(kernels)
    return {
        "kernels_us": round(busy(kernels) / PROFILED, 1),
        "kernels": len(kernels) // PROFILED,
        "stop_us": round(busy(stop) / PROFILED, 2),
        "gap_us": round(max(gaps), 1),
        "gaps_us": round(sum(gaps) / PROFILED, 1),
    }


class Clock(hf.StoppingCriteria):
    """Notes when each token was there; `generate` waits for the device at each one."""

    def __init__(self):
        self.times = []

    def __call__(self, input_ids, scores, **kwargs):
        torch.cuda.synchronize()
        self.times.append(time.perf_counter())
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)


def generate(model: torch.nn.Module, batch: int, context: int, how: str) -> dict:
    clock, options = Clock(), {"cache_implementation": "static"} if how == "static" else {}
    ids = prompts(batch, context).cuda()
    model.generation_config.pad_token_id = 0
    start = time.perf_counter()
    model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=60, do_sample=False, eos_token_id=None,
        stopping_criteria=[clock], **options,
    )  # fmt: skip
    times = [b - a for a, b in itertools.pairwise(clock.times)][20:]
    return {"tbt_us": round(statistics.median(times) * 1e6, 1), "all_s": round(time.perf_counter() - start, 1)}


def measure(shape: str, batch: int, context: int, how: str, show: bool) -> tuple[dict, int]:
    """What a case takes, and the bytes that a step of it must read."""
    warnings.simplefilter("ignore")
    model = model_of(shape)
    if how in ("generate", "static"):
        found = generate(model, batch, context, how)
    else:
        found = engine(model, batch, context, how, show)
    return found, bytes_of_step(model, batch, context)


def in_own_process(function: Callable, *arguments):
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as process:
        return process.submit(function, *arguments).result()


def with_earlier(run: dict, earlier: list[dict], complete: bool) -> list[dict]:
    """The runs to keep: a complete one takes the place of those of its command on its device."""
    of = "command", "device"
    return [run, *(other for other in earlier if not complete or any(other[key] != run[key] for key in of))]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=BENCH / "results" / "engine.json")
    parser.add_argument("--shapes", nargs="+", default=list(SHAPES), choices=SHAPES)
    parser.add_argument("--how", nargs="+", help="only these")
    parser.add_argument("--batches", nargs="+", type=int, help="only these")
    parser.add_argument("--kernels", action="store_true", help="print the kernels of a step in their order")
    add_commit(parser)
    options = parser.parse_args()
    cases = [
        (shape, batch, context, how)
        for shape in options.shapes
        for batch, context, how in CASES[shape]
        if how in (options.how or [how]) and batch in (options.batches or [batch])
    ]
    if not cases:
        parser.error("no case is of these shapes, ways and batches")
    bandwidth = in_own_process(read_bandwidth)
    run = facts(commit=options.commit) | {"read_gb_s": round(bandwidth / 1e9), "budget": BUDGET, "rows": []}
    earlier = json.loads(options.out.read_text())["runs"] if options.out.exists() else []
    for case in cases:
        row = dict(zip(("shape", "batch", "context", "how"), case, strict=True))
        try:
            found, read = in_own_process(measure, *case, options.kernels)
            row |= found | {"floor_us": round(read / bandwidth * 1e6, 1)}
        except Exception as error:
            row["error"] = f"{type(error).__name__}: {error}".partition("\n")[0][:200]
        run["rows"].append(row)
        print(row, flush=True)
        # A run that is cut off leaves what it has found.
        runs = with_earlier(run, earlier, complete=len(run["rows"]) == len(cases))
        options.out.write_text(json.dumps({"runs": runs}, indent=1) + "\n")


if __name__ == "__main__":
    main()

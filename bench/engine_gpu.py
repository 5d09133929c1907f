#!/usr/bin/env python3
"""The engine's time between tokens on a GPU, beside what its bytes allow: bench/engine_gpu.py [--out FILE]

Random bf16 models of the shapes of Qwen2.5-1.5B and Llama-3.1-8B, sequences of 32k tokens, Quest with a budget of 1024.
*Floor*: bytes of the weights, page summaries and selected keys and values that a step reads, over the measured read
bandwidth. *Kernels*: the sum of the kernels of a step, from torch's profiler.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
import warnings
from pathlib import Path

import torch
import transformers as hf

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from run import commit
from timers import read_bandwidth

from lil_ops import Engine, Guardian, Request

BENCH = Path(__file__).resolve().parent
CONTEXT, BUDGET, PAGE, STEPS = 32768, 1024, 16, 60
SHAPES = {
    "qwen-1.5b": (hf.Qwen2Config, dict(hidden_size=1536, intermediate_size=8960, num_hidden_layers=28,
        num_attention_heads=12, num_key_value_heads=2, vocab_size=151936, max_position_embeddings=40000,
        tie_word_embeddings=True)),
    "llama-8b": (hf.LlamaConfig, dict(hidden_size=4096, intermediate_size=14336, num_hidden_layers=32,
        num_attention_heads=32, num_key_value_heads=8, vocab_size=128256, max_position_embeddings=40000)),
}  # fmt: skip


def model_of(shape: str) -> torch.nn.Module:
    config, options = SHAPES[shape]
    with torch.device("cuda"):
        torch.set_default_dtype(torch.bfloat16)
        try:
            return hf.AutoModelForCausalLM.from_config(config(**options)).eval()
        finally:
            torch.set_default_dtype(torch.float32)


def bytes_of_step(model: torch.nn.Module, batch: int) -> int:
    """What a step must read: all weights but the embedding's (a tied one is the head's), and what attention reads."""
    config = model.config
    weights = sum(p.numel() for p in model.parameters()) * 2
    if not config.tie_word_embeddings:
        weights -= config.vocab_size * config.hidden_size * 2
    width = config.num_key_value_heads * (config.hidden_size // config.num_attention_heads) * 2
    sparse = CONTEXT // PAGE * 2 * width + BUDGET * 2 * width
    dense = 2 * CONTEXT * width
    layers = config.num_hidden_layers
    return weights + batch * (2 * dense + (layers - 2) * sparse)


def measure(model: torch.nn.Module, batch: int, graph: bool) -> dict:
    options = {"policy": "quest", "budget": BUDGET, "guardian": Guardian(threshold=0), "lag": STEPS + 9}
    with Engine(model, slots=batch, max_tokens=CONTEXT + 2 * STEPS, eos_token_id=[], graph=graph, **options) as engine:
        generator = torch.Generator().manual_seed(0)
        for row in range(batch):
            prompt = torch.randint(0, 1000, (CONTEXT - STEPS,), generator=generator)
            engine.add(Request(prompt, max_new_tokens=2 * STEPS - 20, seed=row))
        for _ in range(5):
            engine.step()
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(STEPS):
            engine.step()
        torch.cuda.synchronize()
        seconds = (time.perf_counter() - start) / STEPS
        found = {"tbt_us": round(seconds * 1e6, 1)}
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            for _ in range(5):
                engine.step()
            torch.cuda.synchronize()
        kernels = sum(event.self_device_time_total for event in profile.key_averages())
        count = sum(event.count for event in profile.key_averages() if event.self_device_time_total)
        return found | {"kernels_us": round(kernels / 5, 1), "kernels": count // 5}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=BENCH / "results" / "engine.json")
    parser.add_argument("--shapes", nargs="+", default=list(SHAPES), choices=SHAPES)
    parser.add_argument("--commit", default=None)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    bandwidth, rows = read_bandwidth(), []
    for shape in options.shapes:
        model = model_of(shape)
        for batch, graph in ((1, True), (8, True), (1, False)):
            try:
                found = measure(model, batch, graph)
            except RuntimeError as error:
                found = {"error": str(error).partition("\n")[0][:200]}
            floor = bytes_of_step(model, batch) / bandwidth * 1e6
            rows.append({"shape": shape, "batch": batch, "graph": graph, "floor_us": round(floor, 1)} | found)
            print(rows[-1], flush=True)
        del model
        torch.cuda.empty_cache()
    facts = {
        "date": time.strftime("%Y-%m-%d"),
        "commit": options.commit or commit(),
        "device": torch.cuda.get_device_name(),
        "read_gb_s": round(bandwidth / 1e9),
        "versions": {"torch": torch.__version__, "transformers": hf.__version__},
        "command": "python bench/engine_gpu.py",
    }
    options.out.write_text(json.dumps(facts | {"context": CONTEXT, "budget": BUDGET, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()

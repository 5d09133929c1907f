#!/usr/bin/env python3
"""A decode layer on a GPU, operator by operator, as bench/results/layer_cuda.json.

    bench/layer_gpu.py [--out FILE]

bf16 layers of the shapes of Qwen2.5-1.5B and Llama-3.1-8B, each with its own weights and cache of 32k tokens, one
after the other in a CUDA graph: queries, keys and values; Quest's step over 1024 tokens; output; gate and up; down.
*us*: of a layer. *Until*: from torch's profiler, how long after the kernel ahead of it each has ended. *Floor*: bytes
that must be read, over the read bandwidth.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from facts import add_commit, facts
from timers import kernels_of, layer_us, read_bandwidth

import lil_ops

BENCH = Path(__file__).resolve().parent
LAYERS, CONTEXT, PAGE, BUDGET, HEAD_DIM, REPLAYS = 16, 32768, 16, 1024, 128, 3
SHAPES = {  # hidden size, intermediate size, query heads, KV heads
    "Qwen2.5-1.5B": (1536, 8960, 12, 2),
    "Llama-3.1-8B": (4096, 14336, 32, 8),
}
BATCHES = (1, 8)


def normal(*shape: int, scale: float = 1.0) -> torch.Tensor:
    return torch.randn(shape, dtype=torch.bfloat16, device="cuda") * scale


class Layer:
    def __init__(self, shape: str, batch: int, angles: tuple[torch.Tensor, torch.Tensor]):
        hidden, inner, q_heads, kv_heads = SHAPES[shape]
        self.sizes, (self.cos, self.sin) = [q_heads, kv_heads, kv_heads], angles
        pages = batch * (CONTEXT // PAGE)
        self.qkv = normal((q_heads + 2 * kv_heads) * HEAD_DIM, hidden, scale=hidden**-0.5)
        self.output = normal(hidden, q_heads * HEAD_DIM, scale=hidden**-0.5)
        self.gate_up = normal(2 * inner, hidden, scale=hidden**-0.5)
        self.down = normal(hidden, inner, scale=inner**-0.5)
        self.norms = normal(2, hidden)
        self.k_cache, self.v_cache = (normal(pages, kv_heads, PAGE, HEAD_DIM) for _ in range(2))
        self.summary = normal(pages, kv_heads, 2, HEAD_DIM)
        self.page_table = torch.randperm(pages, device="cuda").int().view(batch, -1)
        self.seq_lens = torch.full((batch,), CONTEXT, dtype=torch.int32, device="cuda")

    def weights_bytes(self) -> int:
        return sum(w.numel() * 2 for w in (self.qkv, self.output, self.gate_up, self.down))

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        options = {"cos": self.cos, "sin": self.sin, "rotated": sum(self.sizes[:2]) * HEAD_DIM}
        qkv = lil_ops.decode_linear(x, self.qkv, norm=self.norms[0], **options)
        q, k, v = qkv.unflatten(-1, (-1, HEAD_DIM)).split(self.sizes, 1)
        cache = (self.k_cache, self.v_cache, self.summary, self.page_table, self.seq_lens)
        attended, _ = lil_ops.sparse_decode_step(q, k, v, *cache, BUDGET)
        x = lil_ops.decode_linear(attended.flatten(1), self.output, residual=x)
        inner = lil_ops.decode_linear(x, self.gate_up, norm=self.norms[1], gated=True)
        return lil_ops.decode_linear(inner, self.down, residual=x)


def until(graph: torch.cuda.CUDAGraph) -> list[list]:
    """Name and microseconds of a layer's kernels, in their order: medians over layers."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        for _ in range(REPLAYS):
            graph.replay()
        torch.cuda.synchronize()
    kernels = [kernel for kernel in kernels_of(profile) if "lil::" in kernel[2]]
    each, rest = divmod(len(kernels), REPLAYS * LAYERS)
    assert rest == 0, f"{len(kernels)} kernels"
    ends = [end for _, end, _ in kernels]
    found = []
    for place in range(each, 2 * each):  # the very first layer has nothing ahead
        name = kernels[place][2].partition("<")[0].partition("(lil")[0].rpartition("::")[2]
        after = [ends[i] - ends[i - 1] for i in range(place, len(ends), each)]
        found.append([name, round(statistics.median(after), 1)])
    return found


def graph_of(shape: str, batch: int) -> tuple[torch.cuda.CUDAGraph, list[Layer], torch.Tensor]:
    """All layers, one after the other; they and their input, which the graph reads."""
    angles = (normal(batch, HEAD_DIM), normal(batch, HEAD_DIM))
    layers, x = [Layer(shape, batch, angles) for _ in range(LAYERS)], normal(batch, SHAPES[shape][0])

    def run() -> torch.Tensor:
        y = x
        for layer in layers:
            y = layer(y)
        return y

    run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph, layers, x


def measure(shape: str, batch: int, bandwidth: float) -> dict:
    graph, layers, _x = graph_of(shape, batch)
    width = SHAPES[shape][3] * HEAD_DIM * 2
    read = layers[0].weights_bytes() + batch * (CONTEXT // PAGE + BUDGET) * 2 * width
    return {
        "shape": shape,
        "batch": batch,
        "us": round(layer_us(graph, LAYERS), 1),
        "floor_us": round(read / bandwidth * 1e6, 1),
        "until_us": until(graph),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=BENCH / "results" / "layer_cuda.json")
    add_commit(parser)
    options = parser.parse_args()
    of_run, bandwidth, rows = facts(commit=options.commit), read_bandwidth(), []
    with torch.inference_mode():
        for shape in SHAPES:
            for batch in BATCHES:
                rows.append(measure(shape, batch, bandwidth))
                print(rows[-1], flush=True)
                torch.cuda.empty_cache()
    result = of_run | {"read_gb_s": round(bandwidth / 1e9), "rows": rows}
    options.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()

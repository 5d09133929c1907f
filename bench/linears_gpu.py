#!/usr/bin/env python3
"""The linear layers of a decode step on a GPU: decode_linear beside torch, as bench/results/linears_cuda.json.

    bench/linears_gpu.py [--out FILE]

bf16; CUDA graphs over as many layers, each with its own weight, as keep L2 from helping. *torch*: the same by
torch.compile, norm, product and what follows. *cuBLAS*: the product alone. Floor: the weight over the read bandwidth.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import torch
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from facts import add_commit, facts
from timers import layer_us, read_bandwidth

import lil_ops

BENCH = Path(__file__).resolve().parent
# Name: in_features, rows of the weight, options.
MODELS = {
    "Qwen2.5-1.5B": {
        "qkv": (1536, 2048, {"norm", "bias"}),
        "output": (1536, 1536, {"residual"}),
        "gate and up": (1536, 17920, {"norm", "gated"}),
        "down": (8960, 1536, {"residual"}),
        "head": (1536, 151936, {"norm"}),
    },
    "Llama-3.1-8B": {
        "qkv": (4096, 6144, {"norm"}),
        "output": (4096, 4096, {"residual"}),
        "gate and up": (4096, 28672, {"norm", "gated"}),
        "down": (14336, 4096, {"residual"}),
        "head": (4096, 128256, {"norm"}),
    },
}
ROWS = (1, 8)
BYTES = 1 << 30  # of all the layers' weights together


def by_torch(x, weight, bias=None, norm=None, gated=False, residual=None):
    if norm is not None:
        wide = x.float()
        x = norm * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)).to(x.dtype)
    y = F.linear(x, weight, bias)
    if gated:
        gate, up = y.chunk(2, -1)
        y = F.silu(gate) * up
    return y if residual is None else y + residual


def arguments(rows: int, inputs: int, outputs: int, options: set[str]) -> dict:
    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, dtype=torch.bfloat16, device="cuda")

    given = {"x": random(rows, inputs)}
    if "norm" in options:
        given["norm"] = random(inputs)
    if "bias" in options:
        given["bias"] = random(outputs)
    if "residual" in options:
        given["residual"] = random(rows, outputs)
    if "gated" in options:
        given["gated"] = True
    return given


def us_of(call, weights: list[torch.Tensor]) -> float:
    for weight in weights:
        call(weight)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for weight in weights:
            call(weight)
    return layer_us(graph, len(weights))


def measure(model: str, layer: str, rows: int, bandwidth: float) -> dict:
    inputs, outputs, options = MODELS[model][layer]
    given = arguments(rows, inputs, outputs, options)
    layers = max(1, BYTES // (inputs * outputs * 2))
    scale = inputs**-0.5
    weights = [torch.randn(outputs, inputs, dtype=torch.bfloat16, device="cuda") * scale for _ in range(layers)]
    torch._dynamo.reset()
    compiled = torch.compile(by_torch, dynamic=False)
    ours, theirs = lil_ops.decode_linear(weight=weights[0], **given), by_torch(weight=weights[0], **given)
    torch.testing.assert_close(ours, theirs, rtol=0.05, atol=0.05)
    row = {
        "model": model,
        "layer": layer,
        "rows": rows,
        "lil_us": us_of(lambda weight: lil_ops.decode_linear(weight=weight, **given), weights),
        "torch_us": us_of(lambda weight: compiled(weight=weight, **given), weights),
        "cublas_us": us_of(lambda weight: F.linear(given["x"], weight), weights),
        "floor_us": inputs * outputs * 2 / bandwidth * 1e6,
    }
    return {name: round(value, 2) if isinstance(value, float) else value for name, value in row.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=BENCH / "results" / "linears_cuda.json")
    add_commit(parser)
    options = parser.parse_args()
    of_run, bandwidth, rows = facts(commit=options.commit), read_bandwidth(), []
    with torch.inference_mode():
        for model in MODELS:
            for layer in MODELS[model]:
                for count in ROWS:
                    rows.append(measure(model, layer, count, bandwidth))
                    print(rows[-1], flush=True)
                    torch.cuda.empty_cache()
    result = of_run | {"read_gb_s": round(bandwidth / 1e9), "rows": rows}
    options.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()

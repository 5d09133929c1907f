#!/usr/bin/env python3
"""How near the information loss is to the truth on a real model: bench/loss_quality.py [--model FOLDER] [--text FILE]

The model reads a text and goes on for some steps under Quest. In every layer and step, for each query head, the share
of the softmax mass that the selected pages miss is known exactly (attention over all pages is computed beside), and is
compared with `information_loss` from min/max scores (a bound) and from mean/deviation scores (an estimate). Pages are
selected by the mode that is judged. Writes bench/results/loss.json, and docs/performance.md from it.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from report import report
from run import stamp

import lil_ops
from lil_ops import ops
from lil_ops.policies import Quest

BENCH = Path(__file__).resolve().parent
RESULT = BENCH / "results" / "loss.json"


class Probe(Quest):
    """Quest that notes, for each layer, the loss as told and as it is: ``found[layer]``, a list of (told, true)."""

    def begin(self, cache, prompt_lens):
        super().begin(cache, prompt_lens)
        self.found = [[] for _ in cache.k]

    def select(self, layer, q, cache, scale):
        step, selection = cache.step_of(layer), super().select(layer, q, cache, scale)
        pages, counts, scores = selection
        where = q, cache.k[layer], cache.v[layer], step.page_table, step.seq_lens
        _, read = ops.sparse_decode(*where, pages, counts, scale=scale)
        _, whole = ops.sparse_decode(*where, scale=scale)
        told = ops.information_loss(read, scores, step.seq_lens, cache.page_size, pages, counts)
        self.found[layer].append((told.double(), -torch.expm1((read.double() - whole.double()).clamp(max=0))))
        return selection


def measure(model, tokens: list[int], scoring: str, budget: int, steps: int) -> dict:
    policy = Probe(budget=budget, scoring=scoring, dense_layers=0)
    lil_ops.generate(model, [tokens], policy=policy, max_new_tokens=steps + 1, eos_token_id=[])
    layers = []
    for layer, found in enumerate(policy.found):
        told, true = (torch.cat(column) for column in zip(*found, strict=True))
        error = told - true
        layers.append(
            {
                "layer": layer,
                "true": true.mean().item(),
                "bias": error.mean().item(),
                "mean_absolute_error": error.abs().mean().item(),
                "least": error.min().item(),
            }
        )
    return {"scoring": scoring, "budget": budget, "layers": layers}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="models/SmolLM2-135M-Instruct")
    parser.add_argument("--text", type=Path, default=BENCH.parent / "LICENSE")
    parser.add_argument("--tokens", type=int, default=1500)
    parser.add_argument("--steps", type=int, default=32)
    parser.add_argument("--budgets", type=int, nargs="+", default=[64, 128, 256, 512])
    options = parser.parse_args()
    model, tokenizer = lil_ops.load_model(options.model)
    tokens = tokenizer(options.text.read_text()).input_ids[: options.tokens]
    cases = [
        measure(model, tokens, scoring, budget, options.steps)
        for budget in options.budgets
        for scoring in ("minmax", "meanstd")
    ]
    for case in cases:
        layers = case["layers"]
        mean = {
            key: sum(layer[key] for layer in layers) / len(layers) for key in ("true", "bias", "mean_absolute_error")
        }
        print(case["scoring"], case["budget"], {key: round(value, 4) for key, value in mean.items()},
              "least", min(layer["least"] for layer in layers))  # fmt: skip
    facts = {"model": Path(options.model).name, "tokens": len(tokens), "steps": options.steps}
    RESULT.write_text(
        json.dumps(stamp("python bench/loss_quality.py", torch.get_num_threads()) | facts | {"cases": cases}, indent=1)
        + "\n"
    )
    report()


if __name__ == "__main__":
    main()

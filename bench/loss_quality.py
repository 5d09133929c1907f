#!/usr/bin/env python3
"""How near the information loss is to the truth on real models: bench/loss_quality.py [--models FOLDER ...] [--help]

A model reads windows of a text and goes on densely for some steps. In each step and layer Quest chooses pages by
min/max and by mean/deviation scores, for every sink and budget. They are not what is read, so that all choices meet the
same queries and keys. For each query head the share of the softmax mass that the chosen pages miss is known exactly
(`sparse_decode` over them and over all), and is compared with `information_loss`: a bound from min/max scores, an
estimate from mean/deviation scores. Writes bench/results/loss.json, and docs/performance.md from it.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import torch

BENCH = Path(__file__).resolve().parent
sys.path.insert(0, str(BENCH.parent))

from facts import add_commit, facts  # noqa: E402
from report import report  # noqa: E402

import lil_ops  # noqa: E402
from lil_ops import ops  # noqa: E402
from lil_ops.integrations.transformers import bits_of  # noqa: E402
from lil_ops.policies import Quest  # noqa: E402

RESULT = BENCH / "results" / "loss.json"
TEXT = BENCH.parent / "docs" / "design.md"


class Probe(Quest):
    """Reads everything, and notes what each ``(sink, budget)`` would have missed, as told and as it is.

    ``found[sink, budget]``: a tensor ``[told or true, batch, q_heads]`` a layer, step after step.
    """

    def __init__(self, scoring: str, choices: list[tuple[int, int]]):
        super().__init__(max(budget for _, budget in choices), scoring=scoring, dense_layers=0)
        self.found: dict[tuple[int, int], list[torch.Tensor]] = {choice: [] for choice in choices}

    def select(self, layer, q, cache, scale):
        step, scores = cache.step_of(layer), super().select(layer, q, cache, scale).scores
        where = q, cache.k[layer], cache.v[layer], step.page_table, step.seq_lens
        _, whole = ops.sparse_decode(*where, scale=scale)
        for (sink, budget), found in self.found.items():
            pages, counts = ops.select_pages(scores, step.seq_lens, cache.page_size, budget, sink=sink)
            _, read = ops.sparse_decode(*where, pages, counts, scale=scale)
            told = ops.information_loss(read, scores, step.seq_lens, cache.page_size, pages, counts)
            true = -torch.expm1((read.double() - whole.double()).clamp(max=0))
            found.append(torch.stack([told.double(), true]))
        return None


def measure(model, prompts: list[list[int]], scoring: str, choices: list[tuple[int, int]], steps: int) -> list[dict]:
    """A row of figures for each sink and budget."""
    probe = Probe(scoring, choices)
    lil_ops.generate(model, prompts, policy=probe, max_new_tokens=steps + 1, eos_token_id=())
    rows = []
    for (sink, budget), found in probe.found.items():
        by_layer = torch.stack(found).unflatten(0, (steps, -1)).transpose(0, 2)  # [told or true, layer, step, ...]
        rows.append({"scoring": scoring, "sink": sink, "budget": budget, **figures(*by_layer)})
    return rows


def figures(told: torch.Tensor, true: torch.Tensor) -> dict:
    """Of shares ``[layer, ...]``: how far off in each layer, and the bits that `LilCache.lost_bits` makes of them."""
    error = told - true
    layers = zip(*(x.flatten(1).mean(1).tolist() for x in (true, error, error.abs())), error, strict=True)
    return {
        "true_bits": bits_of(true).mean().item(),
        "told_bits": bits_of(told).mean().item(),
        "layers": [
            {"true": mean, "bias": bias, "mean_absolute_error": absolute, "least": errors.min().item()}
            for mean, bias, absolute, errors in layers
        ],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["models/SmolLM2-135M-Instruct"], metavar="FOLDER")
    parser.add_argument("--text", type=Path, default=TEXT, help="what is read; default: docs/design.md")
    parser.add_argument("--tokens", type=int, nargs="+", default=[1500, 8000], help="of a prompt")
    parser.add_argument("--prompts", type=int, default=2, help="windows of the text, one behind the other")
    parser.add_argument("--steps", type=int, default=32)
    parser.add_argument("--budgets", type=int, nargs="+", default=[64, 128, 256, 512, 1024, 2048])
    parser.add_argument("--sinks", type=int, nargs="+", default=[0, 16], help="tokens at the start, always chosen")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    add_commit(parser)
    parser.add_argument("--out", type=Path, default=RESULT, help="elsewhere: docs/performance.md is left alone")
    options = parser.parse_args()
    cases, of_run = [], facts(options.device, options.commit)
    for folder in options.models:
        model, tokenizer = lil_ops.load_model(folder, dtype=getattr(torch, options.dtype), device=options.device)
        ids = tokenizer(options.text.read_text(encoding="utf-8")).input_ids
        for tokens in options.tokens:
            prompts = [ids[at : at + tokens] for at in range(0, options.prompts * tokens, tokens)]
            if len(prompts[-1]) < tokens:
                parser.error(f"--text: expected {options.prompts} times {tokens} tokens, got {len(ids)}")
            choices = [(sink, budget) for sink in options.sinks for budget in options.budgets if budget < tokens]
            for scoring in ("minmax", "meanstd"):
                for row in measure(model, prompts, scoring, choices, options.steps):
                    cases.append({"model": Path(folder).name, "tokens": tokens, **row})
                    print({key: value for key, value in cases[-1].items() if key != "layers"}, flush=True)
    of_run |= {key: getattr(options, key) for key in ("dtype", "prompts", "steps")} | {"text": options.text.name}
    result = of_run | {"cases": cases}
    options.out.write_text(json.dumps(result, indent=1) + "\n")
    if options.out == RESULT:
        report()


if __name__ == "__main__":
    main()

#!/usr/bin/env python3
"""What float8 page summaries cost Quest: bench/summary_quality.py [--model PATH] [--steps 32] [--nearest]

A bf16 SmolLM2-135M-Instruct (`make models`) reads the beginning of docs/design.md and goes on from there, densely. In
each of its steps and layers (but the first two) pages are chosen by bf16 summaries and by float8 ones. Printed, as
means over steps, layers and heads: the share of the pages that both choose, the true softmax mass on the pages of each,
and the information loss that each tells (a bound with minmax) beside the true one.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from lil_ops import generate, load_model, ops  # noqa: E402
from lil_ops.policies import Quest  # noqa: E402
from lil_ops.reference.append_kv import page_summary, stored  # noqa: E402

BUDGETS = (128, 256)
MODELS = Path(os.environ.get("LIL_MODELS", ROOT / "models"))
FLOAT8 = torch.float8_e4m3fn


class Compared(Quest):
    """Reads everything, and notes what Quest would have chosen by either kind of summary: ``rows`` by budget."""

    def __init__(self, scoring: str, nearest: bool):
        super().__init__(max(BUDGETS), scoring=scoring)
        self.nearest = nearest
        self.rows: dict[int, list[list[float]]] = {budget: [] for budget in BUDGETS}
        self.largest = 0.0  # of all keys

    def select(self, layer, q, cache, scale):
        step, wide = cache.step_of(layer), cache.summary[layer]
        tables = step.page_table, step.seq_lens
        self.largest = max(self.largest, cache.gather(layer, 0)[0].abs().max().item())
        if self.nearest or self.summary_mode == "meanstd":
            narrow = stored(wide, 1.0, FLOAT8)
        else:
            narrow = page_summary(wide.double(), "minmax", FLOAT8)  # a page's min and max are those of two keys
        options = {"scale": scale, "summary_mode": self.summary_mode}
        scores = [ops.score_pages(q, summary, *tables, cache.page_size, **options) for summary in (wide, narrow)]
        mass = torch.empty(*q.shape[:2], step.page_table.shape[-1])
        kv = q, cache.k[layer], cache.v[layer], *tables
        ops.sparse_decode(*kv, scale=scale, page_mass=mass)
        mass = mass.unflatten(1, (cache.kv_heads, -1))
        for budget, rows in self.rows.items():
            chosen, read, told = [], [], []
            for score in scores:
                pages, counts = ops.select_pages(score, step.seq_lens, cache.page_size, budget)
                _, lse = ops.sparse_decode(*kv, pages, counts, scale=scale)
                chosen.append(torch.zeros_like(score).scatter_(-1, pages.long(), 1.0))
                read.append((mass * chosen[-1][:, :, None]).sum(-1).mean().item())
                loss = ops.information_loss(lse, score, step.seq_lens, cache.page_size, pages, counts)
                told.append(loss.mean().item())
            both = (chosen[0] * chosen[1]).sum() / chosen[0].sum()
            rows.append([both.item(), *read, *told])
        return None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, default=MODELS / "SmolLM2-135M-Instruct")
    parser.add_argument("--steps", type=int, default=32)
    parser.add_argument("--nearest", action="store_true", help="round bounds to nearest: then they bound nothing")
    arguments = parser.parse_args()
    model, tokenizer = load_model(arguments.model, dtype=torch.bfloat16)
    text = tokenizer((ROOT / "docs" / "design.md").read_text()).input_ids
    print("scoring  context  budget  both choose  mass read: bf16, float8  loss told: bf16, float8  true")
    for scoring in ("minmax", "meanstd"):
        for context in (1024, 2048 - arguments.steps):
            policy = Compared(scoring, arguments.nearest)
            generate(model, [text[:context]], policy=policy, max_new_tokens=arguments.steps, eos_token_id=())
            for budget, rows in policy.rows.items():
                both, wide, narrow, told_wide, told_narrow = torch.tensor(rows, dtype=torch.float64).mean(0).tolist()
                print(
                    f"{scoring:8} {context:7} {budget:7} {both:12.2%} {wide:17.2%} {narrow:7.2%} "
                    f"{told_wide:17.4f} {told_narrow:7.4f} {1 - wide:6.4f}",
                    flush=True,
                )
    print(f"largest key: {policy.largest:.1f}")


if __name__ == "__main__":
    main()

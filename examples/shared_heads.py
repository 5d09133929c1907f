#!/usr/bin/env python3
"""A policy of one's own: every KV head of a layer reads the pages that any of them ranks highest.

    python examples/shared_heads.py models/SmolLM2-135M-Instruct "How does a bill become a law?"

A policy is a class: its rule in `select`, its state in tensors made by `begin`. The interface is
`lil_ops.policies.Policy`; docs/design.md, section 11, says when each method is called.
"""

from __future__ import annotations

import sys

import lil_ops
from lil_ops import ops
from lil_ops.policies import Policy, Selection


class SharedHeads(Policy):
    name = "shared-heads"
    rule = "the pages with the highest bound over all heads, one selection a layer"
    source = "an example"
    summary_mode = "minmax"  # the cache keeps the min and max of each page's keys

    def select(self, layer, q, cache, scale):
        step = cache.step_of(layer)  # the rows at hand: page table, lengths, prompts
        scores = ops.score_pages(q, cache.summary[layer], step.page_table, step.seq_lens, cache.page_size, scale=scale)
        shared = scores.amax(1, keepdim=True).expand_as(scores)
        return Selection(*self.best_pages(layer, shared, cache))  # in the budget, with sink and recent tokens


def main(model_name: str, question: str) -> None:
    model, tokenizer = lil_ops.load_model(model_name)
    chat = [{"role": "user", "content": question}]
    prompt = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)
    policy = SharedHeads(budget=128, sink=4, dense_layers=2)
    guardian = lil_ops.Guardian(interval=64, threshold=5)
    result = lil_ops.generate(model, [prompt], policy=policy, guardian=guardian, max_new_tokens=256)
    print(tokenizer.decode(result.tokens[0]))
    print(f"{len(result.tokens[0])} tokens, {result.stop_reason[0].name}, TBT {1000 * result.tbt:.0f} ms")


if __name__ == "__main__":
    main(*sys.argv[1:])

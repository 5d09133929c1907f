"""lz77_append: 128k tokens from scratch on one core (the paper reports 34 ms), one token a step, and the worst step.

zlib (level 6, over the int32 token ids) is the yardstick for a parse from scratch: it looks back 32 kB, not everywhere.
"""

import zlib

import pytest
import torch
from sequences import INPUTS, VOCAB

import lil_ops

TOKENS = 1 << 17
HISTORY = 1 << 16


@pytest.mark.parametrize("kind", INPUTS)
@pytest.mark.parametrize("variant", ["lil", "zlib"])
def test_from_scratch(measure, benchmark, kind, variant):
    tokens = INPUTS[kind](TOKENS)[None]
    data = tokens.numpy().tobytes()

    def lil():
        return lil_ops.lz77_append(lil_ops.lz77_state(1, TOKENS), tokens, None, VOCAB)

    function = lil if variant == "lil" else lambda: zlib.compress(data)
    measure(f"lz77_append, 128k tokens, {kind}", variant, function, rounds=15)
    benchmark.extra_info["tokens_per_s"] = round(TOKENS / benchmark.stats.stats.median)


@pytest.mark.parametrize("tokens", [TOKENS // 4, TOKENS, 4 * TOKENS])
def test_growth_with_length(measure, benchmark, tokens):
    stream = INPUTS["text-like"](tokens)[None]
    measure(
        f"lz77_append, {tokens >> 10}k tokens, text-like, growth",
        "lil",
        lambda: lil_ops.lz77_append(lil_ops.lz77_state(1, tokens), stream, None, VOCAB),
        rounds=9,
    )
    benchmark.extra_info["tokens_per_s"] = round(tokens / benchmark.stats.stats.median)


@pytest.mark.parametrize("kind", ["text-like", "random, vocabulary 50k", "random bits", "one repeated token"])
@pytest.mark.parametrize("batch", [1, 32])
def test_one_token_a_step(measure, benchmark, kind, batch):
    stream = INPUTS[kind](TOKENS).expand(batch, TOKENS)
    state = lil_ops.lz77_state(batch, TOKENS)
    lil_ops.lz77_append(state, stream[:, :HISTORY], None, VOCAB)
    steps = iter(stream[:, HISTORY:, None].unbind(1))
    measure(
        f"lz77_append, one token, 64k history, batch {batch}, {kind}",
        "lil",
        lambda: lil_ops.lz77_append(state, next(steps), None, VOCAB),
        rounds=3000,
    )
    benchmark.extra_info["tokens_per_s"] = round(batch / benchmark.stats.stats.median)


def test_worst_step(benchmark):
    """The token that ends a run of 64k equal ones pays for all of them at once."""
    benchmark.group = "lz77_append, one token that ends a run of 64k"
    benchmark.extra_info.update(case=benchmark.group, variant="lil")
    start = lil_ops.lz77_state(1, TOKENS)
    lil_ops.lz77_append(start, torch.ones(1, HISTORY, dtype=torch.int32), None, VOCAB)
    token = torch.zeros(1, 1, dtype=torch.int32)
    benchmark.pedantic(
        lil_ops.lz77_append, setup=lambda: ((start.clone(), token, None, VOCAB), {}), rounds=15, warmup_rounds=1
    )

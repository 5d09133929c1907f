"""lz77_append: 128k tokens from scratch on one core (the paper reports 34 ms), one token a step, and the worst step.

zlib (level 6, over the int32 token ids) is the yardstick for a parse from scratch: it looks back 32 kB, not everywhere.
"""

import zlib

import pytest
import torch

import lil_ops

TOKENS, VOCAB = 1 << 17, 50000
HISTORY = 1 << 16


def random(n, vocab):
    return torch.randint(0, vocab, (n,), generator=torch.Generator().manual_seed(0), dtype=torch.int32)


def text_like(n):
    """Zipf-distributed tokens of which most continue a copy of something earlier, as text and its quotations do."""
    g = torch.Generator().manual_seed(0)
    tokens = (torch.exp(torch.rand(n, generator=g) * 10.8) - 1).int()
    places = torch.rand(n // 10, generator=g)
    for at, place in zip(range(1000, n - 8, 10), places.tolist(), strict=False):
        start = int(place * (at - 10))
        tokens[at : at + 8] = tokens[start : start + 8]
    return tokens


def de_bruijn(n):
    """Every word of 17 bits once, by the rule "1 unless that word was seen" (2^17 bits)."""
    order, word = 17, 0
    seen, bits = {0}, [0] * 17
    while len(bits) < n:
        odd = (word << 1 | 1) & ((1 << order) - 1)
        word = odd if odd not in seen else odd - 1
        seen.add(word)
        bits.append(word & 1)
    return torch.tensor(bits, dtype=torch.int32)


INPUTS = {
    "text-like": text_like,
    "random, vocabulary 50k": lambda n: random(n, VOCAB),
    "random, vocabulary 10": lambda n: random(n, 10),
    "random bits": lambda n: random(n, 2),
    "one repeated token": lambda n: torch.ones(n, dtype=torch.int32),
    "one repeated token, then another": lambda n: torch.cat([torch.ones(n - 1), torch.zeros(1)]).int(),
    "period 2": lambda n: torch.arange(n, dtype=torch.int32) % 2,
    "de Bruijn bits": de_bruijn,
    "copy of far history": lambda n: random(n // 2, VOCAB).repeat(2),
}


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
    stream = text_like(tokens)[None]
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

"""Token sequences for the LZ77 benchmarks: functions of the length, int32."""

import torch

VOCAB = 50000


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

"""sparse_decode on seeded random cases over everything that it takes, against float64.

LIL_RANDOM_CASES sets how many (10000 is for a GPU). The check is vectorised, since `lil_ops.reference` goes token by
token; it is written apart from the reference and compared with it.
"""

import os
from dataclasses import dataclass

import pytest
import torch
from cases import DTYPES, FLOAT8, HEAD_DIMS, PAGE_SIZES, TOLERANCE

import lil_ops
from lil_ops import reference

OPERATOR = "sparse_decode"
CASES = int(os.environ.get("LIL_RANDOM_CASES", "60"))
CHUNK = 500  # cases of one test, so that several processes share many
NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16", FLOAT8: "fp8"}


@dataclass
class Case:
    tensors: tuple  # q, k_cache, v_cache, page_table, seq_lens, pages, counts
    options: dict
    masses: dict  # what the masses are written to, full of NaN


def random_case(device, seed):
    """All numbers come from the seed, whatever the device. What must not be read is NaN, or an id out of range."""
    g = torch.Generator().manual_seed(seed)

    def draw(low, high):  # both included
        return int(torch.randint(low, high + 1, (), generator=g))

    def choose(options):
        return options[draw(0, len(options) - 1)]

    def normal(*shape, dtype):
        return torch.randn(shape, generator=g).to(device).to(dtype)

    batch, kv_heads, group = draw(1, 4), draw(1, 4), choose([1, 2, 3, 4, 5, 6, 7, 8, 9, 12, 16, 20])
    head_dim, page_size = choose(HEAD_DIMS), choose(PAGE_SIZES)
    q_dtype, kv_dtype = choose(DTYPES), choose([*DTYPES, FLOAT8, FLOAT8])
    if draw(0, 2) and kv_dtype != FLOAT8:
        q_dtype = kv_dtype
    longest = choose([1, 15, 16, 100, 600])
    lengths = [choose([draw(0, longest), longest]) for _ in range(batch)]
    used = max(-(-n // page_size) for n in lengths)
    max_pages = max(1, used + choose([0, 0, 1, 40]))
    num_pages = batch * max(used, 1) + 2
    per_head, nhd = not draw(0, 2), not draw(0, 2)

    # Tables: each head's pages, or each sequence's, are some of the pool in random order.
    tables = torch.full((batch, kv_heads if per_head else 1, max_pages), -1, dtype=torch.int32)
    owned = torch.zeros(num_pages, kv_heads, page_size, dtype=torch.bool)
    holes = choose([0.0] * 7 + [0.3] * 2 + [1.0])
    for h in range(tables.size(1)):
        order, taken = torch.randperm(num_pages, generator=g).int(), 0
        for b, n in enumerate(lengths):
            pages = -(-n // page_size)
            physical = order[taken : taken + pages]
            taken += pages
            valid = torch.arange(pages * page_size).view(pages, page_size) < n
            owned[physical, h : h + 1 if per_head else kv_heads] = valid[:, None]
            tables[b, h, :pages] = torch.where(torch.rand(pages, generator=g) < holes, -1, physical)
    page_table = tables if per_head else tables[:, 0]
    owned = owned.to(device)

    scales, options = {}, {}
    scale_kind = choose([None, "head", "page"]) if kv_dtype == FLOAT8 else None
    shape = (num_pages, page_size, kv_heads, head_dim) if nhd else (num_pages, kv_heads, page_size, head_dim)
    caches = []
    for name in ("k_scale", "v_scale"):
        cache = torch.randn(shape, generator=g).to(device)
        cache = cache.transpose(1, 2) if nhd else cache
        if scale_kind:
            scale = 0.02 + torch.rand((kv_heads,) if scale_kind == "head" else (num_pages, kv_heads), generator=g)
            scales[name] = scale.to(device)
            cache = cache / scales[name][..., :, None, None]
        cache = cache.masked_fill(~owned[..., None], torch.nan)
        caches.append((cache.clamp(-448, 448) if kv_dtype == FLOAT8 else cache).to(kv_dtype))

    pages = counts = None
    if draw(0, 3):
        capacity = choose([0, 1, 3, 9, 40])
        pages = torch.full((batch, kv_heads, capacity), -1, dtype=torch.int32)
        for b, n in enumerate(lengths):
            if n:
                last = -(-n // page_size) - 1
                pages[b] = torch.randint(choose([-1, 0]), last + 1, (kv_heads, capacity), generator=g)
                if draw(0, 1):  # as select_pages gives them
                    for h in range(kv_heads):
                        some = torch.randperm(last + 1, generator=g)[:capacity].sort().values.int()
                        pages[b, h] = torch.nn.functional.pad(some, (0, capacity - len(some)), value=-1)
        if draw(0, 1):
            counts = torch.randint(0, capacity + 1, (batch, kv_heads), generator=g, dtype=torch.int32)
            pages[torch.arange(capacity) >= counts[..., None]] = 12345
    options = {
        "scale": choose([None, None, 0.0, 0.05, 0.2, -0.1]),
        "window": choose([0, 0, 0, 1, 30, 300]),
        "softcap": choose([0.0, 0.0, 1.0, 30.0]),
        **scales,
    }
    q = normal(batch, kv_heads * group, head_dim, dtype=q_dtype)
    entries = max_pages if pages is None else pages.size(-1)
    masses = {}
    for name, width in (("page_mass", entries), ("token_mass", entries * page_size)):
        if draw(0, 1):
            masses[name] = torch.full((batch, kv_heads * group, width), torch.nan, device=device)
    tensors = q, *caches, page_table, torch.tensor(lengths, dtype=torch.int32), pages, counts
    return Case(tuple(None if t is None else t.to(device) for t in tensors), options, masses)


def exact(
    q, k_cache, v_cache, page_table, seq_lens, pages, counts, *, scale, window, softcap, k_scale=None, v_scale=None
):
    """``(out, lse, page_mass, token_mass)`` in float64: gather, softmax."""
    batch, q_heads, head_dim = q.shape
    kv_heads, page_size = k_cache.shape[1:3]
    if pages is None:
        pages = torch.arange(page_table.size(-1), device=q.device).expand(batch, kv_heads, -1)
    pages, capacity = pages.long(), pages.size(-1)
    table = page_table.long() if page_table.dim() == 3 else page_table.long()[:, None].expand(-1, kv_heads, -1)
    listed = (pages >= 0) & (pages < table.size(-1))
    if counts is not None:
        listed &= torch.arange(capacity, device=q.device) < counts[..., None]
    physical = table.gather(-1, pages.where(listed, 0)).where(listed, -1)
    positions = pages[..., None] * page_size + torch.arange(page_size, device=q.device)
    ends = seq_lens.long()[:, None, None, None]
    read = (physical >= 0)[..., None] & (positions < ends)
    if window:
        read &= positions >= ends - window
    heads = torch.arange(kv_heads, device=q.device)[:, None]

    def gathered(cache, scales):
        # Not every torch can index float8.
        cache = cache.float() if cache.dtype == FLOAT8 else cache
        rows = cache[physical.clamp_min(0), heads].double()  # [batch, kv_heads, capacity, page_size, head_dim]
        if scales is not None:
            scales = scales.double().expand(len(cache), kv_heads)
            rows = rows * scales[physical.clamp_min(0), heads][..., None, None]
        return rows.where(read[..., None], 0).flatten(2, 3)

    queries = q.double().view(batch, kv_heads, -1, head_dim)
    logits = queries @ gathered(k_cache, k_scale).mT * (head_dim**-0.5 if scale is None else scale)
    if softcap:
        logits = softcap * torch.tanh(logits / softcap)
    logits = logits.where(read.flatten(2)[:, :, None], -torch.inf)
    lse = logits.logsumexp(-1)
    weights = (logits - lse.where(lse.isfinite(), 0)[..., None]).exp()
    out = (weights @ gathered(v_cache, v_scale)).view(q.shape)
    token_mass = weights.view(batch, q_heads, capacity * page_size)
    page_mass = token_mass.view(batch, q_heads, capacity, page_size).sum(-1)
    return out, lse.view(batch, q_heads), page_mass, token_mass


def error(actual, expected, *, least=0.0):
    """Relative error in norm, on the device; infinities must stand in the same places. ``least`` a number on average:
    what the expected norm counts as at least."""
    infinite = expected.isinf()
    difference = (actual.double() - expected).masked_fill(infinite & (actual == expected), 0)
    norm = expected.masked_fill(infinite, 0).norm().clamp_min(least * expected.numel() ** 0.5 + 1e-300)
    return difference.norm() / norm


@pytest.mark.parametrize("seed", range(12))
def test_the_check_is_the_reference(seed):
    case = random_case("cpu", seed)
    out, lse, *masses = exact(*case.tensors, **case.options)
    want = reference.sparse_decode(*case.tensors, **case.options)
    q, k_cache, _, *tables = case.tensors
    options = {name: value for name, value in case.options.items() if name != "v_scale"}
    want = *want, *reference.attention_mass(q, k_cache, *tables, **options)
    for a, b in zip((out, lse, *masses), want, strict=True):
        assert error(a, b) < 1e-13


@pytest.mark.parametrize("first", range(0, CASES, CHUNK))
def test_random_cases(device, first, record_property):
    """The worst relative errors in norm of these cases. `-s` or `-rP` shows them."""
    worst, seeds = {}, range(first, min(first + CHUNK, CASES))
    for seed in seeds:
        case = random_case(device, seed)
        out, lse = lil_ops.sparse_decode(*case.tensors, **case.options, **case.masses)
        want_out, want_lse, page_mass, token_mass = exact(*case.tensors, **case.options)
        # An lse near 0 is the difference of larger numbers.
        found = {"out": error(out, want_out), "lse": error(lse, want_lse, least=1.0)}
        for name, want in (("page_mass", page_mass), ("token_mass", token_mass)):
            if name in case.masses:
                found[name] = error(case.masses[name], want)
        dtypes = tuple(NAMES[t.dtype] for t in case.tensors[:2])
        for name, value in zip(found, torch.stack(list(found.values())).tolist(), strict=True):
            limit = TOLERANCE[out.dtype] if name == "out" else 1e-5
            assert value < limit, f"case {seed}: {name} of {dtypes[0]} queries, {dtypes[1]} cache: {value}"
            key = (name, *dtypes)
            worst[key] = max(worst.get(key, (0.0, 0)), (value, seed))
    lil_ops.check_errors()
    print(f"\n{len(seeds)} random cases from {first} on, {device}: the worst relative errors, and their seeds")
    for (name, q_dtype, kv_dtype), (value, seed) in sorted(worst.items()):
        print(f"  {name:10} {q_dtype} queries, {kv_dtype} cache: {value:.2e} ({seed})")
        record_property(f"{name} {q_dtype} {kv_dtype}", value)
    if len(seeds) >= 60:
        assert {key[2] for key in worst} == set(NAMES.values())

"""Random paged caches, and the comparison with the float64 reference, for the operators' tests."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from lil_ops.reference.append_kv import page_summary

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
FLOAT8 = torch.float8_e4m3fn
# The contract: relative error in norm, by the dtype of the result.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 4e-3, torch.float16: 1e-3}
HEAD_DIMS = [64, 80, 96, 128, 192, 256]
PAGE_SIZES = [8, 16, 32, 64, 128]
# What the scales of a float8 cache are given for: nothing (they are 1), each KV head, each (page, KV head).
SCALES = [None, "head", "page"]


@dataclass
class Paged:
    k: torch.Tensor
    v: torch.Tensor
    summary: torch.Tensor
    page_table: torch.Tensor
    seq_lens: torch.Tensor
    k_scale: torch.Tensor | None = None
    v_scale: torch.Tensor | None = None

    @property
    def scales(self):
        return {"k_scale": self.k_scale, "v_scale": self.v_scale}


def paged(
    device,
    lengths,
    *,
    kv_heads=2,
    head_dim=64,
    page_size=16,
    dtype=torch.float32,
    per_head=False,
    nhd=False,
    seed=0,
    scales=None,
    summary_mode="minmax",
    representatives=2,
    summary_dtype=None,
):
    """A cache whose physical pages are shuffled; pages that no sequence owns hold NaN, so that any read shows.

    ``scales``: of SCALES, for a float8 cache. Then too keys and values are standard normal.
    ``representatives``: a page's keys that its summary in mode "representative" has. ``summary_dtype``: None is
    ``dtype``.
    """
    g = torch.Generator().manual_seed(seed)
    max_pages = max(1, max((-(-n // page_size) for n in lengths), default=1)) + 1
    num_pages = len(lengths) * max_pages + 3
    shape = (num_pages, page_size, kv_heads, head_dim) if nhd else (num_pages, kv_heads, page_size, head_dim)
    k, v = (torch.full(shape, torch.nan, dtype=dtype) for _ in range(2))
    if nhd:
        k, v = k.transpose(1, 2), v.transpose(1, 2)
    summary_shape = num_pages, kv_heads, representatives, head_dim
    summary = torch.full(summary_shape, torch.nan, dtype=summary_dtype or dtype)
    k_scale, v_scale = (random_scale(scales, num_pages, kv_heads, seed + i) for i in range(2))
    tables = [torch.full((len(lengths), max_pages), -1, dtype=torch.int32) for _ in range(kv_heads if per_head else 1)]
    for h, table in enumerate(tables):
        order = torch.randperm(num_pages, generator=g).tolist()
        heads = slice(h, h + 1) if per_head else slice(None)
        for b, n in enumerate(lengths):
            for page in range(-(-n // page_size)):
                physical, valid = order.pop(), min(page_size, n - page * page_size)
                table[b, page] = physical
                keys, values = (torch.randn(k[physical, heads, :valid].shape, generator=g) for _ in range(2))
                keys = store(keys, k_scale, physical, heads, dtype)
                k[physical, heads, :valid] = keys
                v[physical, heads, :valid] = store(values, v_scale, physical, heads, dtype)
                summary[physical, heads] = summarised(keys, summary_mode, representatives, summary.dtype)
    page_table = torch.stack(tables, 1) if per_head else tables[0]
    seq_lens = torch.tensor(lengths, dtype=torch.int32)
    tensors = k, v, summary, page_table, seq_lens, k_scale, v_scale
    return Paged(*(None if t is None else t.to(device) for t in tensors))


def random_scale(scales, num_pages, kv_heads, seed):
    if scales is None:
        return None
    shape = (kv_heads,) if scales == "head" else (num_pages, kv_heads)
    return 0.02 + torch.rand(shape, generator=torch.Generator().manual_seed(seed))


def store(x, scale, physical, heads, dtype):
    """A page's vectors ``[heads, tokens, head_dim]`` as a cache of this dtype holds them."""
    if dtype != FLOAT8:
        return x.to(dtype)
    if scale is not None:
        x = x / (scale[physical] if scale.dim() == 2 else scale)[heads, None, None]
    return x.clamp(-448, 448).to(dtype)


def summarised(keys, mode, representatives, dtype):
    """The summary of a page's keys ``[heads, tokens, head_dim]``. Its representatives: the first, in a circle."""
    if mode == "representative":
        return keys[:, torch.arange(representatives) % keys.size(1)].to(dtype)
    return page_summary(keys.double(), mode, dtype)


def queries(device, batch, q_heads, head_dim, dtype=torch.float32, seed=1):
    return torch.randn(batch, q_heads, head_dim, generator=torch.Generator().manual_seed(seed)).to(device, dtype)


def random_lists(cache, kv_heads, capacity, seed=0, *, with_counts=True):
    """``(pages, counts)``: duplicates, -1 anywhere, any order, and past the counts what must not be looked at."""
    g = torch.Generator().manual_seed(seed)
    page_size, lengths = cache.k.size(2), cache.seq_lens.tolist()
    pages = torch.full((len(lengths), kv_heads, capacity), -1, dtype=torch.int32)
    for b, n in enumerate(lengths):
        if n:
            pages[b] = torch.randint(-1, -(-n // page_size), (kv_heads, capacity), generator=g)
    counts = None
    if with_counts:
        counts = torch.randint(0, capacity + 1, (len(lengths), kv_heads), generator=g, dtype=torch.int32)
        pages[torch.arange(capacity) >= counts[..., None]] = 12345
        counts = counts.to(cache.k.device)
    return pages.to(cache.k.device), counts


def relative_error(actual, expected):
    """Norm of the difference over the norm of the expected; infinities must stand in the same places."""
    actual, expected = actual.double().cpu(), expected.double().cpu()
    finite = expected.isfinite()
    assert torch.equal(actual[~finite], expected[~finite])
    return ((actual - expected)[finite].norm() / expected[finite].norm().clamp_min(1e-30)).item()


def assert_same(actual, expected):
    """Equal values, NaN in the same places, in any dtype."""
    assert actual.dtype == expected.dtype
    if actual.dtype == FLOAT8:
        actual, expected = actual.float(), expected.float()
    torch.testing.assert_close(actual, expected, rtol=0, atol=0, equal_nan=True)


# opcheck without the test of the schema, which compares values as torch does not with float8.
OPCHECKS_OF_FLOAT8 = ("test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")


def without_nan(t):
    """`nan_to_num` in any dtype."""
    return t.float().nan_to_num().to(t.dtype)

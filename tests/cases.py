"""Random paged caches, and the comparison with the float64 reference, for the operators' tests."""

from __future__ import annotations

from dataclasses import dataclass

import torch

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# The contract: relative error in norm, by the dtype of the result.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 4e-3, torch.float16: 1e-3}
HEAD_DIMS = [64, 80, 96, 128, 192, 256]
PAGE_SIZES = [8, 16, 32, 64, 128]


@dataclass
class Paged:
    k: torch.Tensor
    v: torch.Tensor
    summary: torch.Tensor
    page_table: torch.Tensor
    seq_lens: torch.Tensor


def paged(
    device, lengths, *, kv_heads=2, head_dim=64, page_size=16, dtype=torch.float32, per_head=False, nhd=False, seed=0
):
    """A cache whose physical pages are shuffled; pages that no sequence owns hold NaN, so that any read shows."""
    g = torch.Generator().manual_seed(seed)
    max_pages = max(1, max((-(-n // page_size) for n in lengths), default=1)) + 1
    num_pages = len(lengths) * max_pages + 3
    shape = (num_pages, page_size, kv_heads, head_dim) if nhd else (num_pages, kv_heads, page_size, head_dim)
    k, v = (torch.full(shape, torch.nan, dtype=dtype) for _ in range(2))
    if nhd:
        k, v = k.transpose(1, 2), v.transpose(1, 2)
    summary = torch.full((num_pages, kv_heads, 2, head_dim), torch.nan, dtype=dtype)
    tables = [torch.full((len(lengths), max_pages), -1, dtype=torch.int32) for _ in range(kv_heads if per_head else 1)]
    for h, table in enumerate(tables):
        order = torch.randperm(num_pages, generator=g).tolist()
        heads = slice(h, h + 1) if per_head else slice(None)
        for b, n in enumerate(lengths):
            for page in range(-(-n // page_size)):
                physical, valid = order.pop(), min(page_size, n - page * page_size)
                table[b, page] = physical
                keys = torch.randn(k[physical, heads, :valid].shape, generator=g).to(dtype)
                k[physical, heads, :valid] = keys
                v[physical, heads, :valid] = torch.randn(keys.shape, generator=g).to(dtype)
                summary[physical, heads, 0], summary[physical, heads, 1] = keys.amin(1), keys.amax(1)
    page_table = torch.stack(tables, 1) if per_head else tables[0]
    seq_lens = torch.tensor(lengths, dtype=torch.int32)
    return Paged(*(t.to(device) for t in (k, v, summary, page_table, seq_lens)))


def queries(device, batch, q_heads, head_dim, dtype=torch.float32, seed=1):
    return torch.randn(batch, q_heads, head_dim, generator=torch.Generator().manual_seed(seed)).to(device, dtype)


def relative_error(actual, expected):
    """Norm of the difference over the norm of the expected; infinities must stand in the same places."""
    actual, expected = actual.double().cpu(), expected.double().cpu()
    finite = expected.isfinite()
    assert torch.equal(actual[~finite], expected[~finite])
    return ((actual - expected)[finite].norm() / expected[finite].norm().clamp_min(1e-30)).item()

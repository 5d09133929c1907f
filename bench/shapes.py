"""The attention benchmarks' common case: bf16, 8 KV heads x group 4, head_dim 128, page 16, context 32k, budget 2k."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from lil_ops.cache import huge_pages

FLOAT8 = torch.float8_e4m3fn
KV_HEADS, GROUP, HEAD_DIM, PAGE_SIZE, CONTEXT, BUDGET = 8, 4, 128, 16, 32768, 2048


@dataclass
class Case:
    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    summary: torch.Tensor
    page_table: torch.Tensor
    seq_lens: torch.Tensor


def case(batch: int, dtype: torch.dtype = torch.bfloat16) -> Case:
    """Full sequences of CONTEXT tokens whose pages lie in random order, in memory as `PagedKVCache` asks for it.

    Queries of a float8 cache are bf16.
    """
    torch.manual_seed(0)
    pages = CONTEXT // PAGE_SIZE

    def random(*shape: int) -> torch.Tensor:
        return huge_pages(torch.empty(shape, dtype=dtype)).copy_(torch.randn(shape))

    k, v = (random(batch * pages, KV_HEADS, PAGE_SIZE, HEAD_DIM) for _ in range(2))
    summary = huge_pages(torch.empty(batch * pages, KV_HEADS, 2, HEAD_DIM, dtype=dtype))
    keys = k.bfloat16() if dtype == FLOAT8 else k  # the same values, which torch can compare
    return Case(
        q=torch.randn(batch, KV_HEADS * GROUP, HEAD_DIM).to(keys.dtype),
        k=k,
        v=v,
        summary=summary.copy_(torch.stack([keys.amin(2), keys.amax(2)], 2)),
        page_table=torch.randperm(batch * pages).int().view(batch, pages),
        seq_lens=torch.full((batch,), CONTEXT, dtype=torch.int32),
    )


def flat_index(c: Case, pages: torch.Tensor) -> torch.Tensor:
    """Rows of ``cache.flatten(0, 1)`` for logical pages ``[batch, kv_heads, n]``: what a gather in PyTorch needs."""
    physical = c.page_table[torch.arange(len(pages))[:, None, None], pages.long()].long()
    return (physical * KV_HEADS + torch.arange(KV_HEADS)[:, None]).flatten()

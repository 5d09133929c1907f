"""compact_kv of full heads down to the budget, against PyTorch's gather and indexed assignment of the same rows."""

import pytest
import shapes
import torch

import lil_ops

BUDGET, BUFFER = 2048, 128  # R-KV compacts budget + buffer tokens to the budget


@pytest.mark.parametrize("batch", [1, 8])
@pytest.mark.parametrize("variant", ["lil", "index + index_put"])
def test_compact_kv(measure, batch, variant):
    torch.manual_seed(0)
    size, heads = shapes.PAGE_SIZE, shapes.KV_HEADS
    used, pages = BUDGET + BUFFER, (BUDGET + BUFFER) // size
    k, v = (torch.randn(batch * pages, heads, size, shapes.HEAD_DIM).bfloat16() for _ in range(2))
    page_table = torch.randperm(batch * pages).int().view(batch, pages)
    keep = torch.rand(batch, heads, used).topk(BUDGET).indices.sort().values.int()
    counts = torch.full((batch,), BUDGET, dtype=torch.int32)

    def lil():
        lil_ops.compact_kv(k, v, page_table, keep, counts)

    def peer():
        rows, head = torch.arange(batch)[:, None, None], torch.arange(heads)[:, None]
        source, target = keep.long(), torch.arange(BUDGET)
        page, to = page_table[rows, source // size].long(), page_table[rows, target // size].long()
        for cache in (k, v):
            cache[to, head, target % size] = cache[page, head, source % size]

    before = k.clone(), v.clone()
    lil()
    got = k.clone(), v.clone()
    k.copy_(before[0]), v.copy_(before[1])
    peer()
    assert torch.equal(k, got[0]) and torch.equal(v, got[1])
    moved = 2 * 2 * batch * heads * BUDGET * shapes.HEAD_DIM * 2  # read and written, K and V
    measure(f"compact_kv, batch {batch}", variant, lil if variant == "lil" else peer, bytes=moved, rounds=50)

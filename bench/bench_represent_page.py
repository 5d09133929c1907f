"""represent_page against the same in eager PyTorch: a list of 2048 tokens, a window of 1024, four representatives.

``leaves``: a page leaves the window at this step, as at one in sixteen.
"""

import pytest
import shapes
import torch

import lil_ops

RECENT, REPRESENTATIVES, CONTEXT = shapes.BUDGET // 2, 4, 8192


@pytest.mark.parametrize("batch", [1, 8])
@pytest.mark.parametrize("leaves", [False, True])
@pytest.mark.parametrize("variant", ["lil", "eager"])
def test_represent_page(measure, leaves, batch, variant):
    size, heads, q_heads = shapes.PAGE_SIZE, shapes.KV_HEADS, shapes.KV_HEADS * shapes.GROUP
    torch.manual_seed(0)
    num_pages, entries = batch * CONTEXT // size, shapes.BUDGET // size
    k_cache = torch.randn(num_pages, heads, size, shapes.HEAD_DIM, dtype=torch.bfloat16)
    summary = torch.zeros(num_pages, heads, 1, shapes.HEAD_DIM, dtype=torch.bfloat16)
    table = torch.randperm(num_pages, dtype=torch.int32).view(batch, -1)
    weight = torch.zeros(batch, heads, CONTEXT)
    seq_lens = torch.full((batch,), CONTEXT - 1 - (0 if leaves else 3), dtype=torch.int32)
    # The older half of the list is anywhere, the window is its end.
    recent = torch.arange((CONTEXT - RECENT) // size, CONTEXT // size)
    pages = torch.cat([torch.arange(entries - len(recent)), recent]).int().repeat(batch, heads, 1)
    mass = torch.randn(batch, q_heads, entries * size).softmax(-1)
    within, head = torch.arange(size), torch.arange(heads)[:, None]

    def lil():
        arguments = summary, weight, k_cache, table, seq_lens, mass, pages
        lil_ops.represent_page(*arguments, recent=RECENT, representatives=REPRESENTATIVES)

    def eager():
        tokens = (pages[..., None] * size + within).flatten(2).long()
        got = mass.unflatten(1, (heads, -1)).sum(2)
        weight.scatter_add_(2, tokens, got.masked_fill_(tokens < seq_lens[:, None, None] - RECENT, 0))
        if leaves:
            page = (seq_lens + 1 - RECENT).long() // size - 1
            physical = table.gather(1, page[:, None])[:, 0].long()
            here = (page[:, None] * size + within)[:, None].expand(-1, heads, -1)
            best = weight.gather(2, here).topk(REPRESENTATIVES).indices
            summary[physical] = k_cache[physical[:, None, None], head, best].mean(2, keepdim=True)

    case = f"represent_page{', a page leaves' if leaves else ''}, batch {batch}"
    measure(case, variant, lil if variant == "lil" else eager, rounds=500)

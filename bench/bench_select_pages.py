"""select_pages against torch.topk and a sort."""

import pytest
import shapes
import torch

import lil_ops


@pytest.mark.parametrize("batch", [1, 8])
@pytest.mark.parametrize("variant", ["lil", "topk + sort"])
def test_select_pages(measure, batch, variant):
    torch.manual_seed(0)
    scores = torch.randn(batch, shapes.KV_HEADS, shapes.CONTEXT // shapes.PAGE_SIZE)
    seq_lens = torch.full((batch,), shapes.CONTEXT, dtype=torch.int32)

    def lil():
        return lil_ops.select_pages(scores, seq_lens, shapes.PAGE_SIZE, shapes.BUDGET)[0]

    def peer():
        forced = scores.clone()
        forced[..., -1] = torch.inf
        return forced.topk(shapes.BUDGET // shapes.PAGE_SIZE, sorted=False).indices.sort().values.int()

    assert torch.equal(lil(), peer())
    measure(f"select_pages, batch {batch}", variant, lil if variant == "lil" else peer, rounds=500)

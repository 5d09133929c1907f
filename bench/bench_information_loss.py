"""information_loss against plain PyTorch: scores of read pages to -inf, logsumexp, sigmoid."""

import math

import pytest
import shapes
import torch

import lil_ops


@pytest.mark.parametrize("batch", [1, 8])
@pytest.mark.parametrize("variant", ["lil", "scatter + logsumexp"])
def test_information_loss(measure, batch, variant):
    torch.manual_seed(0)
    scores = torch.randn(batch, shapes.KV_HEADS, shapes.CONTEXT // shapes.PAGE_SIZE)
    seq_lens = torch.full((batch,), shapes.CONTEXT, dtype=torch.int32)
    pages, counts = lil_ops.select_pages(scores, seq_lens, shapes.PAGE_SIZE, shapes.BUDGET)
    lse = torch.randn(batch, shapes.KV_HEADS * shapes.GROUP) + 8

    def lil():
        return lil_ops.information_loss(lse, scores, seq_lens, shapes.PAGE_SIZE, pages, counts)

    def peer():
        # Every page is full, and every list.
        unread = scores.scatter(-1, pages.long(), -torch.inf).logsumexp(-1, keepdim=True)
        difference = unread + math.log(shapes.PAGE_SIZE) - lse.view(batch, shapes.KV_HEADS, shapes.GROUP)
        return difference.sigmoid().flatten(1)

    torch.testing.assert_close(lil(), peer(), rtol=1e-5, atol=1e-7)
    measure(f"information_loss, batch {batch}", variant, lil if variant == "lil" else peer, rounds=500)

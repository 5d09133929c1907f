"""score_pages against the fastest plain PyTorch: gather the summaries, one batched matmul, max over the group."""

import pytest
import shapes
import torch

import lil_ops


@pytest.mark.parametrize("batch", [1, 8])
@pytest.mark.parametrize("variant", ["lil", "lil meanstd", "lil float8", "gather + matmul"])
def test_score_pages(measure, batch, variant):
    c = shapes.case(batch, shapes.FLOAT8 if variant == "lil float8" else torch.bfloat16)
    mode = "meanstd" if variant == "lil meanstd" else "minmax"
    pages = c.page_table.size(1)
    everything = torch.arange(pages).expand(batch, shapes.KV_HEADS, pages)
    index = shapes.flat_index(c, everything)

    def lil():
        return lil_ops.score_pages(c.q, c.summary, c.page_table, c.seq_lens, shapes.PAGE_SIZE, summary_mode=mode)

    def peer():
        q = c.q.view(batch, shapes.KV_HEADS, shapes.GROUP, shapes.HEAD_DIM) * shapes.HEAD_DIM**-0.5
        split = torch.cat([q.clamp(max=0), q.clamp(min=0)], -1)
        summaries = c.summary.flatten(0, 1).flatten(1).index_select(0, index)
        summaries = summaries.view(batch, shapes.KV_HEADS, pages, 2 * shapes.HEAD_DIM)
        return (split @ summaries.mT).amax(2).float()

    if variant in ("lil", "gather + matmul"):
        torch.testing.assert_close(lil(), peer(), rtol=0.05, atol=0.05)
    function = peer if variant == "gather + matmul" else lil
    measure(
        f"score_pages, batch {batch}",
        variant,
        function,
        bytes=c.summary.numel() * c.summary.element_size(),
        rounds=30 if variant == "gather + matmul" else 300,
    )

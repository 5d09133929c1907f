"""score_pages against the fastest plain PyTorch: gather the summaries, one batched matmul, max over the group (or the
product with its mean query, for representative keys)."""

import pytest
import shapes
import torch

import lil_ops
from lil_ops.cache import huge_pages


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


@pytest.mark.parametrize("batch", [1, 8])
@pytest.mark.parametrize("variant", ["lil", "gather + matmul"])
def test_score_pages_representative(measure, batch, variant):
    """Four keys of each page."""
    c = shapes.case(batch)
    chosen = c.k[:, :, ::4]
    representatives = huge_pages(torch.empty(chosen.shape, dtype=chosen.dtype)).copy_(chosen)
    pages = c.page_table.size(1)
    index = shapes.flat_index(c, torch.arange(pages).expand(batch, shapes.KV_HEADS, pages))

    def lil():
        return lil_ops.score_pages(
            c.q, representatives, c.page_table, c.seq_lens, shapes.PAGE_SIZE, summary_mode="representative"
        )

    def peer():
        q = c.q.view(batch, shapes.KV_HEADS, shapes.GROUP, shapes.HEAD_DIM).float().mean(2) * shapes.HEAD_DIM**-0.5
        keys = representatives.flatten(0, 1).flatten(1).index_select(0, index).view(batch, shapes.KV_HEADS, pages, -1)
        return (keys @ (q / 4).to(keys.dtype).repeat(1, 1, 4)[..., None])[..., 0].float()

    torch.testing.assert_close(lil(), peer(), rtol=0.05, atol=0.05)
    measure(
        f"score_pages representative, batch {batch}",
        variant,
        lil if variant == "lil" else peer,
        bytes=representatives.numel() * representatives.element_size(),
        rounds=30 if variant == "gather + matmul" else 300,
    )

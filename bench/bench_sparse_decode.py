"""sparse_decode against gather (index_select) + scaled_dot_product_attention, and against reading everything."""

import pytest
import shapes
import torch
import torch.nn.functional as F

import lil_ops


@pytest.mark.parametrize("batch", [1, 8])
@pytest.mark.parametrize("variant", ["lil", "lil masses", "lil float8", "gather + sdpa", "lil dense"])
def test_sparse_decode(measure, batch, variant):
    c = shapes.case(batch, shapes.FLOAT8 if variant == "lil float8" else torch.bfloat16)
    masses = {}
    if variant == "lil masses":
        heads = batch, shapes.KV_HEADS * shapes.GROUP
        masses["page_mass"] = torch.empty(*heads, shapes.BUDGET // shapes.PAGE_SIZE)
        masses["token_mass"] = torch.empty(*heads, shapes.BUDGET)
    scores = torch.randn(batch, shapes.KV_HEADS, c.page_table.size(1))
    pages, counts = lil_ops.select_pages(scores, c.seq_lens, shapes.PAGE_SIZE, shapes.BUDGET)
    q = c.q[:, :, None]

    def gathered(cache, index):
        rows = cache.flatten(0, 1).index_select(0, index)
        return rows.view(batch, shapes.KV_HEADS, shapes.BUDGET, shapes.HEAD_DIM)

    def peer():
        index = shapes.flat_index(c, pages)
        return F.scaled_dot_product_attention(q, gathered(c.k, index), gathered(c.v, index), enable_gqa=True)

    def lil():
        return lil_ops.sparse_decode(c.q, c.k, c.v, c.page_table, c.seq_lens, pages, counts, **masses)

    def dense():
        return lil_ops.sparse_decode(c.q, c.k, c.v, c.page_table, c.seq_lens)

    if variant != "lil float8":
        torch.testing.assert_close(lil()[0], peer()[:, :, 0], rtol=0.05, atol=0.01)
    tokens = shapes.CONTEXT if variant == "lil dense" else shapes.BUDGET
    measure(
        f"sparse_decode, batch {batch}",
        variant,
        {"gather + sdpa": peer, "lil dense": dense}.get(variant, lil),
        bytes=2 * batch * shapes.KV_HEADS * tokens * shapes.HEAD_DIM * c.k.element_size(),
        rounds=30 if variant in ("gather + sdpa", "lil dense") else 300,
    )

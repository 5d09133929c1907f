"""sparse_decode_step against the four operators it stands for, and against dense attention over the same cache."""

import pytest
import shapes
import torch

import lil_ops


@pytest.mark.parametrize("batch", [1, 8])
@pytest.mark.parametrize("variant", ["lil", "lil loss", "lil float8", "four operators", "append + dense"])
def test_sparse_decode_step(measure, batch, variant):
    c = shapes.case(batch, shapes.FLOAT8 if variant == "lil float8" else torch.bfloat16)
    loss = torch.empty(batch, shapes.KV_HEADS * shapes.GROUP) if variant == "lil loss" else None
    k, v = (torch.randn(batch, shapes.KV_HEADS, shapes.HEAD_DIM).bfloat16() for _ in range(2))

    def append():
        lil_ops.append_kv(c.k, c.v, c.summary, k, v, c.page_table, c.seq_lens)

    def lil():
        tables = c.page_table, c.seq_lens
        return lil_ops.sparse_decode_step(c.q, k, v, c.k, c.v, c.summary, *tables, shapes.BUDGET, loss=loss)

    def four():
        append()
        scores = lil_ops.score_pages(c.q, c.summary, c.page_table, c.seq_lens, shapes.PAGE_SIZE)
        pages, counts = lil_ops.select_pages(scores, c.seq_lens, shapes.PAGE_SIZE, shapes.BUDGET)
        return lil_ops.sparse_decode(c.q, c.k, c.v, c.page_table, c.seq_lens, pages, counts)

    def dense():
        append()
        return lil_ops.sparse_decode(c.q, c.k, c.v, c.page_table, c.seq_lens)

    assert torch.equal(lil()[0], four()[0])
    token = shapes.KV_HEADS * shapes.HEAD_DIM * c.k.element_size() * 2
    attended, summaries = shapes.BUDGET * token, shapes.CONTEXT // shapes.PAGE_SIZE * token
    measure(
        f"sparse_decode_step, batch {batch}",
        variant,
        {"four operators": four, "append + dense": dense}.get(variant, lil),
        bytes=batch * (shapes.CONTEXT * token if variant == "append + dense" else attended + summaries),
        rounds=30 if variant == "append + dense" else 200,
    )

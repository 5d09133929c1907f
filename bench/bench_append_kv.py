"""append_kv (one token a sequence with summaries; a prompt) against indexed assignment, which keeps no summaries."""

import pytest
import shapes
import torch

import lil_ops

PROMPT = 4096


@pytest.mark.parametrize(
    "variant", ["lil", "lil meanstd", "lil float8", "lil float8 summaries", "lil slots", "index_put"]
)
def test_append_one_token(measure, variant):
    c = shapes.case(8, shapes.FLOAT8 if variant == "lil float8" else torch.bfloat16)
    if "summaries" in variant:
        c.summary = c.summary.to(shapes.FLOAT8)
    k, v = (torch.randn(8, shapes.KV_HEADS, shapes.HEAD_DIM).bfloat16() for _ in range(2))
    mode = "meanstd" if "meanstd" in variant else "minmax"
    slots = torch.randint(0, int(c.seq_lens.min()), (8, shapes.KV_HEADS)).int() if "slots" in variant else None

    def lil():
        lil_ops.append_kv(c.k, c.v, c.summary, k, v, c.page_table, c.seq_lens, summary_mode=mode, slots=slots)

    def peer():
        last = c.seq_lens.long() - 1
        page = c.page_table[torch.arange(8), last // shapes.PAGE_SIZE].long()
        c.k[page, :, last % shapes.PAGE_SIZE] = k
        c.v[page, :, last % shapes.PAGE_SIZE] = v

    measure("append_kv, one token, batch 8", variant, peer if variant == "index_put" else lil, rounds=500)


@pytest.mark.parametrize("variant", ["lil", "index_put"])
def test_append_prompt(measure, variant):
    c = shapes.case(1)
    k, v = (torch.randn(shapes.KV_HEADS, PROMPT, shapes.HEAD_DIM).bfloat16().transpose(0, 1) for _ in range(2))
    seq_lens, cu_seqlens = torch.tensor([PROMPT], dtype=torch.int32), torch.tensor([0, PROMPT], dtype=torch.int32)

    def lil():
        lil_ops.append_kv(c.k, c.v, c.summary, k, v, c.page_table, seq_lens, cu_seqlens)

    def peer():
        places = torch.arange(PROMPT)
        page = c.page_table[0, places // shapes.PAGE_SIZE].long()
        c.k[page, :, places % shapes.PAGE_SIZE] = k
        c.v[page, :, places % shapes.PAGE_SIZE] = v

    moved = 2 * 2 * PROMPT * shapes.KV_HEADS * shapes.HEAD_DIM * 2  # read and written, K and V
    measure("append_kv, prompt of 4096", variant, lil if variant == "lil" else peer, bytes=moved, rounds=100)

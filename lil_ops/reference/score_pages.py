"""Definition of score_pages."""

from __future__ import annotations

import torch

from lil_ops.reference._pages import num_pages, physical_page


def score_pages(q, summary, page_table, seq_lens, page_size, *, scale=None, summary_mode="minmax"):
    """See `lil_ops.score_pages`; float64 result."""
    assert summary_mode == "minmax"
    batch, q_heads, head_dim = q.shape
    kv_heads = summary.size(1)
    scale = head_dim**-0.5 if scale is None else scale
    queries = q.double().view(batch, kv_heads, q_heads // kv_heads, head_dim)
    scores = torch.full((batch, kv_heads, page_table.size(-1)), -torch.inf, dtype=torch.float64, device=q.device)
    for b, length in enumerate(seq_lens.tolist()):
        for h in range(kv_heads):
            for page in range(num_pages(length, page_size)):
                physical = physical_page(page_table, b, h, page)
                if physical < 0:
                    continue
                low, high = summary[physical, h].double()
                bound = torch.maximum(queries[b, h] * low, queries[b, h] * high).sum(-1)
                scores[b, h, page] = scale * bound.max()
    return scores

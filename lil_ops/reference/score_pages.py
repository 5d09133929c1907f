"""Definition of score_pages."""

from __future__ import annotations

import torch

from lil_ops.reference._pages import num_pages, page_scale, physical_page


def score_pages(q, summary, page_table, seq_lens, page_size, *, scale=None, summary_mode="minmax", k_scale=None):
    """See `lil_ops.score_pages`; float64 result."""
    assert summary_mode in ("minmax", "meanstd", "representative")
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
                unit = scale * float(page_scale(k_scale, physical, h))
                vectors = summary[physical, h].double()
                if summary_mode == "representative":
                    scores[b, h, page] = unit * (queries[b, h] @ vectors.T).mean()
                    continue
                first, second = vectors
                if summary_mode == "minmax":
                    heads = unit * torch.maximum(queries[b, h] * first, queries[b, h] * second).sum(-1)
                else:
                    # Mean, and half the variance, of the logits of normal keys with independent elements.
                    variance = (queries[b, h] ** 2 * second**2).sum(-1)
                    heads = unit * (queries[b, h] @ first) + 0.5 * unit**2 * variance
                scores[b, h, page] = heads.max()
    return scores

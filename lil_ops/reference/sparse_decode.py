"""Definition of sparse_decode."""

from __future__ import annotations

import torch

from lil_ops.reference._pages import num_pages, physical_page


def sparse_decode(
    q, k_cache, v_cache, page_table, seq_lens, pages=None, counts=None, *, scale=None, window=0, softcap=0.0
):
    """See `lil_ops.sparse_decode`; float64 results."""
    batch, q_heads, head_dim = q.shape
    kv_heads, page_size = k_cache.shape[1:3]
    scale = head_dim**-0.5 if scale is None else scale
    queries = q.double().view(batch, kv_heads, q_heads // kv_heads, head_dim)
    out = torch.zeros_like(queries)
    lse = torch.full(queries.shape[:3], -torch.inf, dtype=torch.float64, device=q.device)
    for b, length in enumerate(seq_lens.tolist()):
        for h in range(kv_heads):
            listed = range(num_pages(length, page_size)) if pages is None else pages[b, h].tolist()
            listed = list(listed) if counts is None else listed[: int(counts[b, h])]
            keys, values = [], []
            for page in listed:
                for slot in range(page_size):
                    position = page * page_size + slot
                    if page >= 0 and position < length and (window == 0 or position >= length - window):
                        physical = physical_page(page_table, b, h, page)
                        if physical == -1:
                            continue
                        keys.append(k_cache[physical, h, slot].double())
                        values.append(v_cache[physical, h, slot].double())
            if keys:
                logits = scale * (queries[b, h] @ torch.stack(keys).T)
                if softcap > 0:
                    logits = softcap * torch.tanh(logits / softcap)
                # A query head whose every logit is -inf reads nothing.
                reads = ~logits.isneginf().all(-1)
                out[b, h, reads] = logits[reads].softmax(-1) @ torch.stack(values)
                lse[b, h] = logits.logsumexp(-1)
    return out.view(q.shape), lse.view(batch, q_heads)

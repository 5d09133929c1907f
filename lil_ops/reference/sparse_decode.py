"""Definition of sparse_decode."""

from __future__ import annotations

import torch

from lil_ops.reference._pages import num_pages, page_scale, physical_page


def sparse_decode(
    q,
    k_cache,
    v_cache,
    page_table,
    seq_lens,
    pages=None,
    counts=None,
    *,
    scale=None,
    window=0,
    softcap=0.0,
    k_scale=None,
    v_scale=None,
):
    """See `lil_ops.sparse_decode`; float64 results. `attention_mass` is what it writes where it is asked to."""
    batch, q_heads, head_dim = q.shape
    kv_heads = k_cache.size(1)
    queries = q.double().view(batch, kv_heads, q_heads // kv_heads, head_dim)
    out = torch.zeros_like(queries)
    lse = torch.full(queries.shape[:3], -torch.inf, dtype=torch.float64, device=q.device)
    for b, h, read in _reads(k_cache, page_table, seq_lens, pages, counts, window):
        logits = _logits(queries[b, h], k_cache, h, read, scale, softcap, k_scale)
        values = [v_cache[physical, h, slot].double() * page_scale(v_scale, physical, h) for _, physical, slot in read]
        # A query head whose every logit is -inf reads nothing.
        reads = ~logits.isneginf().all(-1)
        out[b, h, reads] = logits[reads].softmax(-1) @ torch.stack(values)
        lse[b, h] = logits.logsumexp(-1)
    return out.view(q.shape), lse.view(batch, q_heads)


def attention_mass(
    q, k_cache, page_table, seq_lens, pages=None, counts=None, *, scale=None, window=0, softcap=0.0, k_scale=None
):
    """`sparse_decode`'s (page_mass, token_mass), float64: the shares of the softmax mass that was read."""
    batch, q_heads, head_dim = q.shape
    kv_heads, page_size = k_cache.shape[1:3]
    capacity = page_table.size(-1) if pages is None else pages.size(-1)
    queries = q.double().view(batch, kv_heads, q_heads // kv_heads, head_dim)
    mass = torch.zeros((*queries.shape[:3], capacity * page_size), dtype=torch.float64, device=q.device)
    for b, h, read in _reads(k_cache, page_table, seq_lens, pages, counts, window):
        logits = _logits(queries[b, h], k_cache, h, read, scale, softcap, k_scale)
        reads = ~logits.isneginf().all(-1)
        places = torch.tensor([entry * page_size + slot for entry, _, slot in read], device=q.device)
        for head in reads.nonzero().flatten().tolist():
            mass[b, h, head, places] = logits[head].softmax(-1)
    mass = mass.view(batch, q_heads, capacity, page_size)
    return mass.sum(-1), mass.flatten(2)


def _reads(k_cache, page_table, seq_lens, pages, counts, window):
    """(sequence, KV head, [(list entry, physical page, slot), ...]) of all that read something."""
    kv_heads, page_size = k_cache.shape[1:3]
    for b, length in enumerate(seq_lens.tolist()):
        for h in range(kv_heads):
            listed = range(num_pages(length, page_size)) if pages is None else pages[b, h].tolist()
            listed = list(listed) if counts is None else listed[: int(counts[b, h])]
            read = []
            for entry, page in enumerate(listed):
                physical = physical_page(page_table, b, h, page) if page >= 0 else -1
                for slot in range(page_size):
                    position = page * page_size + slot
                    if physical != -1 and position < length and (window == 0 or position >= length - window):
                        read.append((entry, physical, slot))
            if read:
                yield b, h, read


def _logits(queries, k_cache, h, read, scale, softcap, k_scale):
    keys = [k_cache[physical, h, slot].double() * page_scale(k_scale, physical, h) for _, physical, slot in read]
    logits = (queries.size(-1) ** -0.5 if scale is None else scale) * (queries @ torch.stack(keys).T)
    return softcap * torch.tanh(logits / softcap) if softcap > 0 else logits

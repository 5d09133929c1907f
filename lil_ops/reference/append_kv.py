"""Definition of append_kv."""

from __future__ import annotations

import torch

from lil_ops.reference._pages import page_scale, physical_page

LARGEST_FLOAT8 = 448.0


def append_kv(
    k_cache,
    v_cache,
    summary,
    k,
    v,
    page_table,
    seq_lens,
    cu_seqlens=None,
    *,
    summary_mode="minmax",
    k_scale=None,
    v_scale=None,
    slots=None,
):
    """See `lil_ops.append_kv`. Pure: returns the new (k_cache, v_cache, summary)."""
    assert summary_mode in ("minmax", "meanstd")
    assert cu_seqlens is None or slots is None
    k_cache, v_cache = k_cache.clone(), v_cache.clone()
    summary = None if summary is None else summary.clone()
    _, kv_heads, page_size, _ = k_cache.shape
    offsets = range(len(seq_lens) + 1) if cu_seqlens is None else cu_seqlens.tolist()
    for b, length in enumerate(seq_lens.tolist()):
        count = offsets[b + 1] - offsets[b]
        if cu_seqlens is None and length == 0:
            continue  # takes no part
        for h in range(kv_heads):
            first = length - count if slots is None or slots[b, h] == -1 else int(slots[b, h])
            for token in range(first, first + count):
                page, slot = divmod(token, page_size)
                physical = physical_page(page_table, b, h, page)
                row = offsets[b] + token - first
                k_cache[physical, h, slot] = stored(k[row, h], page_scale(k_scale, physical, h), k_cache.dtype)
                v_cache[physical, h, slot] = stored(v[row, h], page_scale(v_scale, physical, h), v_cache.dtype)
                if summary is not None:
                    keys = k_cache[physical, h, : length - page * page_size].double()
                    if summary_mode == "minmax":
                        vectors = keys.amin(0), keys.amax(0)
                    else:
                        vectors = keys.mean(0), keys.std(0, correction=0)
                    summary[physical, h] = torch.stack(vectors).to(summary.dtype)
    return k_cache, v_cache, summary


def stored(x, scale, dtype):
    """x as a cache of this dtype holds it."""
    if dtype != torch.float8_e4m3fn:
        return x
    return (x.float() / scale).clamp(-LARGEST_FLOAT8, LARGEST_FLOAT8).to(dtype)

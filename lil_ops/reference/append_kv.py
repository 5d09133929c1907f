"""Definition of append_kv."""

from __future__ import annotations

from lil_ops.reference._pages import physical_page


def append_kv(k_cache, v_cache, summary, k, v, page_table, seq_lens, cu_seqlens=None, *, summary_mode="minmax"):
    """See `lil_ops.append_kv`. Pure: returns the new (k_cache, v_cache, summary)."""
    assert summary_mode == "minmax"
    k_cache, v_cache = k_cache.clone(), v_cache.clone()
    summary = None if summary is None else summary.clone()
    _, kv_heads, page_size, _ = k_cache.shape
    offsets = range(len(seq_lens) + 1) if cu_seqlens is None else cu_seqlens.tolist()
    for b, length in enumerate(seq_lens.tolist()):
        first = length - (offsets[b + 1] - offsets[b])
        for h in range(kv_heads):
            for token in range(first, length):
                page, slot = divmod(token, page_size)
                physical = physical_page(page_table, b, h, page)
                row = offsets[b] + token - first
                k_cache[physical, h, slot] = k[row, h]
                v_cache[physical, h, slot] = v[row, h]
                if summary is not None:
                    keys = k_cache[physical, h, : length - page * page_size]
                    summary[physical, h, 0] = keys.amin(0)
                    summary[physical, h, 1] = keys.amax(0)
    return k_cache, v_cache, summary

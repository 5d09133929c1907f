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
                    summary[physical, h] = page_summary(keys, summary_mode, summary.dtype)
    return k_cache, v_cache, summary


def page_summary(keys, mode, dtype):
    """``[..., tokens, head_dim]`` float64 keys -> ``[..., 2, head_dim]``, as a summary of this dtype holds them."""
    if mode == "minmax":
        low, high = keys.amin(-2), keys.amax(-2)
        if dtype == torch.float8_e4m3fn:
            low, high = -at_least(-low), at_least(high)
        return torch.stack((low, high), -2).to(dtype)
    vectors = torch.stack((keys.mean(-2), keys.std(-2, correction=0)), -2)
    return stored(vectors, 1.0, dtype).to(dtype)


def at_least(x):
    """The least float8 value that is not below x; NaN where there is none."""
    codes = torch.arange(128, dtype=torch.uint8, device=x.device)
    values = codes.view(torch.float8_e4m3fn).double()  # 0 to 448, and then NaN
    values = torch.cat([-values[1:127].flip(0), values])
    return values[torch.searchsorted(values[:-1], x.contiguous())]


def stored(x, scale, dtype):
    """x as a cache of this dtype holds it."""
    if dtype != torch.float8_e4m3fn:
        return x
    return (x.float() / scale).clamp(-LARGEST_FLOAT8, LARGEST_FLOAT8).to(dtype)

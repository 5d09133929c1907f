"""Definition of compact_kv."""

from __future__ import annotations

import torch

from lil_ops.reference._pages import physical_page


def compact_kv(k_cache, v_cache, page_table, keep, counts):
    """See `lil_ops.compact_kv`. Pure: returns (k_cache, v_cache)."""
    old = k_cache, v_cache
    # Bits, whatever they mean: not every torch can index float8.
    old = [t.view(torch.uint8) if t.element_size() == 1 else t for t in old]
    new = [t.clone() for t in old]
    kv_heads, page_size = k_cache.shape[1:3]
    for b, count in enumerate(counts.tolist()):
        for h in range(kv_heads):
            for i, slot in enumerate(keep[b, h, :count].tolist()):
                source = physical_page(page_table, b, h, slot // page_size), h, slot % page_size
                target = physical_page(page_table, b, h, i // page_size), h, i % page_size
                for before, after in zip(old, new, strict=True):
                    after[target] = before[source]
    return new[0].view(k_cache.dtype), new[1].view(v_cache.dtype)

"""Definition of key_redundancy."""

from __future__ import annotations

import torch

from lil_ops.reference._pages import physical_page


def key_redundancy(k_cache, page_table, seq_lens, *, threshold=0.5, positions=None):
    """See `lil_ops.key_redundancy`; float64 result."""
    kv_heads, page_size = k_cache.shape[1:3]
    slots = page_table.size(-1) * page_size
    redundancy = torch.zeros((len(seq_lens), kv_heads, slots), dtype=torch.float64, device=k_cache.device)
    for b, n in enumerate(seq_lens.tolist()):
        for h in range(kv_heads):
            order = list(range(n)) if positions is None else positions[b, h, :n].tolist()
            cosine = cosines(k_cache, page_table, b, h, n)
            for row in cosine:
                similar = (row > threshold).nonzero().flatten().tolist()
                # The latest similar one; without any, the earliest of all.
                row[max(similar, key=order.__getitem__) if similar else min(range(n), key=order.__getitem__)] = 0
            redundancy[b, h, :n] = cosine.sum(0) / n
    return redundancy


def cosines(k_cache, page_table, b, h, n):
    """Of the keys in slots 0 to n - 1 of one head, all with all, float64; a key's own is 0."""
    page_size, head_dim = k_cache.shape[2:]
    keys = [k_cache[physical_page(page_table, b, h, slot // page_size), h, slot % page_size] for slot in range(n)]
    keys = torch.stack(keys).double() if keys else k_cache.new_zeros((0, head_dim), dtype=torch.float64)
    unit = keys / (keys.norm(dim=-1, keepdim=True) + 1e-8)
    return (unit @ unit.T).fill_diagonal_(0)

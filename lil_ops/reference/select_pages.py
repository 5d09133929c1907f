"""Definition of select_pages."""

from __future__ import annotations

import math

import torch

from lil_ops.reference._pages import num_pages


def select_pages(scores, seq_lens, page_size, budget, *, sink=0, recent=1, protected_lens=None):
    """See `lil_ops.select_pages`."""
    batch, kv_heads, max_pages = scores.shape
    budget_pages = budget // page_size
    pages = torch.full((batch, kv_heads, min(budget_pages, max_pages)), -1, dtype=torch.int32, device=scores.device)
    counts = torch.zeros((batch, kv_heads), dtype=torch.int32, device=scores.device)
    for b, length in enumerate(seq_lens.tolist()):
        n = num_pages(length, page_size)
        first_recent = max(0, length - recent) // page_size
        head = sink if protected_lens is None else max(sink, int(protected_lens[b]))
        for h in range(kv_heads):
            # What is wanted, best first: recent pages, the head of the sequence in order, then by score (NaN first).
            order = list(range(first_recent, n))
            order += range(min(first_recent, num_pages(head, page_size)))
            rest = [page for page in range(n) if page not in order]
            row = scores[b, h].tolist()
            order += sorted(rest, key=lambda page: (0, 0, page) if math.isnan(row[page]) else (1, -row[page], page))
            chosen = sorted(order[:budget_pages])
            counts[b, h] = len(chosen)
            pages[b, h, : len(chosen)] = torch.tensor(chosen, dtype=torch.int32)
    return pages, counts

"""Definition of evict_pages."""

from __future__ import annotations

import math

import torch

from lil_ops.reference._pages import num_pages


def evict_pages(
    held, priority, seq_lens, page_size, *, sink=0, recent=1, protected_lens=None, page_table=None, slot_pages=None
):
    """See `lil_ops.evict_pages`. Pure: returns (slots, held, page_table)."""
    held, page_table = held.clone(), None if page_table is None else page_table.clone()
    slots = torch.full(held.shape[:2], -1, dtype=torch.int32, device=held.device)
    for b, length in enumerate(seq_lens.tolist()):
        opened = num_pages(length, page_size) - 1
        protected = sink if protected_lens is None else max(sink, int(protected_lens[b]))
        for h in range(held.size(1)):
            pages = held[b, h].tolist()
            if length == 0 or opened in pages:
                continue

            def order(slot, pages=pages, b=b, h=h, protected=protected, length=length):
                """What goes first: a free slot; the least priority; the last of the pages that are protected."""
                page, value = pages[slot], float(priority[b, h, slot])
                if page < 0:
                    return (0, slot)
                if page < num_pages(protected, page_size):
                    return (3, -page)
                return (2, page) if math.isnan(value) else (1, value, page)

            first_recent = max(0, length - recent) // page_size
            slot = min((s for s, page in enumerate(pages) if page < first_recent), key=order)
            if page_table is not None:
                if pages[slot] >= 0:
                    page_table[b, h, pages[slot]] = -1
                page_table[b, h, opened] = slot_pages[b, slot]
            held[b, h, slot] = opened
            slots[b, h] = slot
    return slots, held, page_table

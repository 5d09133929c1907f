"""evict_pages in a step in which every head gives something up, against the same rule in eager PyTorch: where slots are
pages (one step in page_size), and where they are tokens (every step)."""

import pytest
import torch

import lil_ops

HEADS, CONTEXT, SINK = 8, 20000, 4


def full_heads(batch, capacity, page_size):
    """``(held, priority, seq_lens)``: the newest token begins a page, and no slot is free."""
    pages = -(-CONTEXT // page_size)
    held = torch.stack([torch.randperm(pages - 1)[:capacity] for _ in range(batch * HEADS)]).int()
    priority = torch.rand(batch, HEADS, capacity)
    return held.view(batch, HEADS, capacity), priority, torch.full((batch,), (pages - 1) * page_size + 1).int()


def eager_slots(held, priority, seq_lens, page_size, recent):
    """``(page, slots)``, ``[batch, kv_heads, 1]``."""
    lengths = seq_lens[:, None, None]
    kept = (held * page_size < SINK) | (held >= (lengths - recent) // page_size)
    slots = priority.masked_fill(kept, torch.inf).argmin(-1, keepdim=True)
    return ((lengths - 1) // page_size).expand_as(slots), slots


@pytest.mark.parametrize("batch", [1, 8])
@pytest.mark.parametrize("variant", ["lil", "eager"])
def test_evict_pages(measure, batch, variant):
    page_size, capacity = 16, 128
    held, priority, seq_lens = full_heads(batch, capacity, page_size)
    slot_pages = torch.arange(batch * capacity, dtype=torch.int32).view(batch, capacity)
    table = torch.full((batch, HEADS, -(-CONTEXT // page_size)), -1, dtype=torch.int32)
    table.scatter_(2, held.long(), slot_pages[:, None].expand_as(held))
    begun = table.clone(), held.clone()

    def lil():
        table.copy_(begun[0]), held.copy_(begun[1])
        lil_ops.evict_pages(
            held, priority, seq_lens, page_size, sink=SINK, recent=page_size, page_table=table, slot_pages=slot_pages
        )

    def peer():
        table.copy_(begun[0]), held.copy_(begun[1])
        opened, slots = eager_slots(held, priority, seq_lens, page_size, page_size)
        table.scatter_(2, held.gather(2, slots).long(), -1)
        table.scatter_(2, opened.long(), slot_pages[:, None].expand_as(held).gather(2, slots))
        held.scatter_(2, slots, opened)

    measure(f"evict_pages, batch {batch}", variant, lil if variant == "lil" else peer, rounds=500)


@pytest.mark.parametrize("batch", [1, 8])
@pytest.mark.parametrize("variant", ["lil", "eager"])
def test_evict_tokens(measure, batch, variant):
    capacity = 512
    held, priority, seq_lens = full_heads(batch, capacity, 1)
    begun = held.clone()

    def lil():
        held.copy_(begun)
        lil_ops.evict_pages(held, priority, seq_lens, 1, sink=SINK, recent=capacity // 2)

    def peer():
        held.copy_(begun)
        opened, slots = eager_slots(held, priority, seq_lens, 1, capacity // 2)
        held.scatter_(2, slots, opened)

    measure(f"evict_pages, 512 token slots, batch {batch}", variant, lil if variant == "lil" else peer, rounds=500)

"""evict_pages in a step that opens a page in every head (one in page_size), against the same rule in eager PyTorch."""

import pytest
import torch

import lil_ops

HEADS, PAGE, CAPACITY, CONTEXT = 8, 16, 128, 20000


@pytest.mark.parametrize("batch", [1, 8])
@pytest.mark.parametrize("variant", ["lil", "eager"])
def test_evict_pages(measure, batch, variant):
    pages = -(-CONTEXT // PAGE)
    held = torch.stack([torch.randperm(pages - 1)[:CAPACITY] for _ in range(batch * HEADS)]).int()
    held = held.view(batch, HEADS, CAPACITY)
    slot_pages = torch.arange(batch * CAPACITY, dtype=torch.int32).view(batch, CAPACITY)
    table = torch.full((batch, HEADS, pages), -1, dtype=torch.int32)
    table.scatter_(2, held.long(), slot_pages[:, None].expand_as(held))
    priority = torch.rand(batch, HEADS, CAPACITY)
    seq_lens = torch.full((batch,), (pages - 1) * PAGE + 1, dtype=torch.int32)
    begun = table.clone(), held.clone()

    def lil():
        table.copy_(begun[0]), held.copy_(begun[1])
        lil_ops.evict_pages(table, held, slot_pages, priority, seq_lens, PAGE, sink=4, recent=PAGE)

    def peer():
        table.copy_(begun[0]), held.copy_(begun[1])
        opened = (seq_lens.long()[:, None, None] - 1) // PAGE
        kept = (held == 0) | (held >= ((seq_lens[:, None, None] - PAGE) // PAGE))
        slots = priority.masked_fill(kept, torch.inf).argmin(-1, keepdim=True)
        opened = opened.expand_as(slots)
        table.scatter_(2, held.gather(2, slots).long(), -1)
        table.scatter_(2, opened, slot_pages[:, None].expand_as(held).gather(2, slots))
        held.scatter_(2, slots, opened.int())

    measure(f"evict_pages, batch {batch}", variant, lil if variant == "lil" else peer, rounds=500)

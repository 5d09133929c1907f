"""Definition of fold_mass."""

from __future__ import annotations

import torch


def fold_mass(priority, mass, held, seq_lens, page_size, *, rule="sum", shared=False, share=0.5):
    """See `lil_ops.fold_mass`. Pure: returns the priority."""
    kv_heads, capacity = priority.shape[1:]
    groups = mass.double().unflatten(1, (1 if shared else kv_heads, -1))
    folded = torch.zeros(priority.shape, dtype=torch.float64, device=priority.device)
    slots = min(capacity, mass.size(2))
    folded[..., :slots] = groups.sum(2)[..., :slots]
    lengths = seq_lens[:, None, None].expand_as(held)
    begun = (held >= 0) & (held * page_size + 1 == lengths)
    if rule == "sum":
        folded += priority.double().masked_fill(begun, 0)
    elif rule == "stamp":
        there = held >= 0
        more = ((folded[..., None, :] > folded[..., None]) & there[..., None, :]).sum(-1)
        top = there & (more < share * there.sum(-1, keepdim=True).double())
        folded = torch.where(top | begun, lengths, priority.double())
    return torch.where(lengths > 0, folded, priority.double())  # a sequence of no tokens takes no part

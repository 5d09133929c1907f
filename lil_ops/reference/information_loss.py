"""Definition of information_loss."""

from __future__ import annotations

import math

import torch

from lil_ops.reference._pages import num_pages


def information_loss(lse, scores, seq_lens, page_size, pages, counts=None, *, softcap=0.0):
    """See `lil_ops.information_loss`; float64 result."""
    batch, q_heads = lse.shape
    kv_heads = scores.size(1)
    loss = torch.zeros((batch, kv_heads, q_heads // kv_heads), dtype=torch.float64, device=lse.device)
    read = lse.double().view(loss.shape)
    for b, length in enumerate(seq_lens.tolist()):
        for h in range(kv_heads):
            listed = pages[b, h].tolist() if counts is None else pages[b, h, : int(counts[b, h])].tolist()
            masses = []
            for page in range(num_pages(length, page_size)):
                score = scores[b, h, page].double()
                # -inf is a page that is not mapped: nothing was there to read, whatever the softcap.
                if page in listed or score.isneginf():
                    continue
                score = softcap * torch.tanh(score / softcap) if softcap > 0 else score
                masses.append(score + math.log(min(page_size, length - page * page_size)))
            if masses:
                # U / (U + exp(lse)); lse = -inf gives 1.
                loss[b, h] = torch.sigmoid(torch.stack(masses).logsumexp(0) - read[b, h])
    return loss.view(batch, q_heads)

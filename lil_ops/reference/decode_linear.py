"""Definition of decode_linear."""

from __future__ import annotations

import torch
from torch.nn import functional as F


def decode_linear(
    x, weight, bias=None, *, norm=None, eps=1e-6, gated=False, residual=None, cos=None, sin=None, rotated=0
):
    """See `lil_ops.decode_linear`."""
    y = x.double()
    if norm is not None:
        y = norm.double() * y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + eps)
    y = F.linear(y, weight.double(), None if bias is None else bias.double())
    if gated:
        gate, up = y.chunk(2, -1)
        y = F.silu(gate) * up
    if rotated:
        heads = y[..., :rotated].unflatten(-1, (-1, cos.shape[-1]))
        first, second = heads.chunk(2, -1)
        heads = heads * cos.double().unsqueeze(-2) + torch.cat((-second, first), -1) * sin.double().unsqueeze(-2)
        y = torch.cat((heads.flatten(-2), y[..., rotated:]), -1)
    return y if residual is None else y + residual.double()

"""Choosing the next token of each sequence from its logits."""

from __future__ import annotations

import math

import torch
from torch.nn import functional as F

from lil_ops.checks import is_number, is_whole

PARTS = 128  # of a row, for `most_likely`


def check_sampling(temperature: float, top_k: int, top_p: float) -> None:
    """Raise ValueError, naming the option, unless `sample` takes these options."""
    # Logits are divided by it in float32, where a smaller number may count as 0 and a larger one as infinity.
    least, most = torch.finfo(torch.float32).tiny, torch.finfo(torch.float32).max
    if not (is_number(temperature, least, most) or is_number(temperature, 0, 0)):
        raise ValueError(
            f"temperature: expected 0 (greedy) or a number from {least:.8g} to {most:.8g}, got {temperature!r}"
        )
    if not is_whole(top_k, 0):
        raise ValueError(f"top_k: expected a whole number of at least 0 (0: all tokens), got {top_k!r}")
    if not is_number(top_p, 0, 1) or top_p == 0:
        raise ValueError(f"top_p: expected a number of more than 0 and at most 1, got {top_p!r}")


def sample(
    logits: torch.Tensor, uniforms: torch.Tensor, temperature: float = 0.0, top_k: int = 0, top_p: float = 1.0
) -> torch.Tensor:
    """The next token of each sequence: the most likely one, or a draw from the filtered distribution.

    A row's token is a function of that row's logits and uniform number alone, so it does not depend on the batch around
    it. Tensor operations only, no host sync.

    Args:
        logits: ``[batch, vocab]``, floating. uniforms: ``[batch]``, floating, in [0, 1); not read when greedy.
        temperature: divides the logits, a normal float32; 0 takes the largest logit.
        top_k: keep the k most likely tokens; 0 keeps all. top_p: of those keep the fewest most likely ones whose
            probability reaches ``top_p``.

    Returns:
        ``[batch]`` int64.

    Raises ValueError for a shape, dtype or option out of these bounds.

    Equivalent PyTorch: inverse transform sampling, ``(kept_probabilities.cumsum(-1) <= uniform).sum()``.
    """
    check_sampling(temperature, top_k, top_p)
    if logits.ndim != 2 or not logits.is_floating_point():
        raise ValueError(f"logits: expected floating [batch, vocab], got {logits.dtype} of shape {list(logits.shape)}")
    if temperature == 0:
        return logits.argmax(-1)
    if uniforms.shape != logits.shape[:1] or not uniforms.is_floating_point():
        raise ValueError(f"uniforms: expected floating [batch], got {uniforms.dtype} of shape {list(uniforms.shape)}")

    # Relative to the largest, so that a low temperature does not take it to infinity.
    logits, tokens = logits.float(), None
    logits = (logits - logits.amax(-1, keepdim=True)) / float(temperature)
    if 0 < top_k < logits.shape[1]:
        logits, tokens = logits.topk(top_k)
    elif top_p < 1:
        logits, tokens = logits.sort(dim=-1, descending=True, stable=True)
    # float64, so that the cumulative sum of a large vocabulary keeps its rare tokens apart.
    cumulative = logits.softmax(-1).double().cumsum(-1)
    # A token stays while those before it have not reached top_p, so the first always does.
    last = torch.searchsorted(cumulative, float(top_p) * cumulative[:, -1:])
    target = uniforms[:, None].double() * cumulative.gather(1, last)
    # Rounding may carry the largest uniforms up to the total, past the last token.
    index = torch.minimum(torch.searchsorted(cumulative, target, right=True), last)
    return (index if tokens is None else tokens.gather(1, index))[:, 0]


def most_likely(logits: torch.Tensor) -> torch.Tensor:
    """``logits.argmax(-1)`` of floating ``[batch, vocab]``, for torch.compile: Inductor leaves a whole row's argmax to
    one block, so the row goes in parts, of which many blocks work at once."""
    parts = F.pad(logits, (0, -logits.shape[1] % PARTS), value=-math.inf).unflatten(1, (PARTS, -1))
    first = parts.argmax(-1)
    part = parts.gather(2, first[..., None])[..., 0].argmax(-1, keepdim=True)
    return (part * parts.shape[2] + first.gather(1, part))[:, 0]

"""Definition of guardian_check."""

from __future__ import annotations

RUNNING, GUARDIAN = 0, 3


def guardian_check(sizes, num_tokens, interval, threshold, checkpoint, gain, stop):
    """See `lil_ops.guardian_check`. Pure: returns the new (checkpoint, gain, stop)."""
    checkpoint, gain, stop = checkpoint.clone(), gain.clone(), stop.clone()
    for b in range(len(sizes)):
        tokens_then, size_then = checkpoint[b].tolist()
        if stop[b] != RUNNING or interval[b] < 1 or num_tokens[b] - tokens_then < interval[b]:
            continue
        gain[b] = sizes[b] - size_then
        checkpoint[b, 0], checkpoint[b, 1] = num_tokens[b], sizes[b]
        if gain[b] < threshold[b]:
            stop[b] = GUARDIAN
    return checkpoint, gain, stop

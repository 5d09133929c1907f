"""guardian_check in a step where no interval ends (all but one in 250) against the same rule in eager PyTorch."""

import pytest
import torch

import lil_ops
from lil_ops.guardian import Guardian
from lil_ops.stopping import StopReason


@pytest.mark.parametrize("batch", [1, 32, 1024])
@pytest.mark.parametrize("variant", ["lil", "eager"])
def test_guardian_check(measure, batch, variant):
    state = Guardian().start(batch)
    sizes, num_tokens = (torch.full((batch,), n, dtype=torch.int32) for n in (50, 100))
    stop = torch.zeros(batch, dtype=torch.int32)

    def lil():
        lil_ops.guardian_check(sizes, num_tokens, state.interval, state.threshold, state.checkpoint, state.gain, stop)

    def peer():
        due = (stop == 0) & (state.interval >= 1) & (num_tokens - state.checkpoint[:, 0] >= state.interval)
        state.gain.copy_(torch.where(due, sizes - state.checkpoint[:, 1], state.gain))
        now = torch.stack([num_tokens, sizes], 1)
        state.checkpoint.copy_(torch.where(due[:, None], now, state.checkpoint))
        stop.masked_fill_(due & (state.gain < state.threshold), StopReason.GUARDIAN)

    measure(f"guardian_check, batch {batch}", variant, lil if variant == "lil" else peer, rounds=2000)

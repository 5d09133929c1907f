"""fold_mass against the same in eager PyTorch, over a budget of 1024 tokens, or of 64 pages."""

import pytest
import torch

import lil_ops

KV_HEADS, Q_HEADS = 8, 32
CASES = {"sum": (1024, {}), "last": (1024, {"shared": True}), "stamp": (64, {})}


@pytest.mark.parametrize("batch", [1, 8])
@pytest.mark.parametrize("rule", CASES)
@pytest.mark.parametrize("variant", ["lil", "eager"])
def test_fold_mass(measure, rule, batch, variant):
    torch.manual_seed(0)
    capacity, options = CASES[rule]
    held = torch.rand(batch, KV_HEADS, capacity).argsort(-1).int()
    mass = torch.randn(batch, Q_HEADS, capacity).softmax(-1)
    priority, lengths = torch.zeros(batch, KV_HEADS, capacity), torch.full((batch,), capacity, dtype=torch.int32)

    def lil():
        lil_ops.fold_mass(priority, mass, held, lengths, 1, rule=rule, **options)

    def eager():
        begun = held + 1 == lengths[:, None, None]
        if rule == "last":
            priority.copy_(mass.sum(1, keepdim=True))
            return
        folded = mass.unflatten(1, (KV_HEADS, -1)).sum(2)
        if rule == "sum":
            priority.masked_fill_(begun, 0).add_(folded)
            return
        least = folded.topk(capacity // 2, sorted=True).values[..., -1:]
        priority.masked_fill_((folded >= least) | begun, float(capacity))

    measure(f"fold_mass {rule}, batch {batch}", variant, lil if variant == "lil" else eager, rounds=500)

"""decode_linear against the same in eager PyTorch: the layers of Qwen2.5-1.5B, a step of one and of eight sequences."""

import pytest
import torch
from torch.nn import functional as F

import lil_ops

HIDDEN, QKV, MLP = 1536, 2048, 8960


@pytest.mark.parametrize("layer", ["qkv", "gate and up", "down"])
@pytest.mark.parametrize("batch", [1, 8])
@pytest.mark.parametrize("variant", ["lil", "eager"])
def test_decode_linear(measure, layer, batch, variant):
    torch.manual_seed(0)

    def random(*shape):
        return torch.randn(shape).bfloat16()

    x, norm = random(batch, HIDDEN), random(HIDDEN)
    hidden, bias, residual = random(batch, MLP), random(QKV), x
    weight = {"qkv": random(QKV, HIDDEN), "gate and up": random(2 * MLP, HIDDEN), "down": random(HIDDEN, MLP)}[layer]

    def normalised():
        wide = x.float()
        return norm * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)).bfloat16()

    def gated():
        gate, up = F.linear(normalised(), weight).chunk(2, -1)
        return F.silu(gate) * up

    run = {
        ("lil", "qkv"): lambda: lil_ops.decode_linear(x, weight, bias, norm=norm),
        ("lil", "gate and up"): lambda: lil_ops.decode_linear(x, weight, norm=norm, gated=True),
        ("lil", "down"): lambda: lil_ops.decode_linear(hidden, weight, residual=residual),
        ("eager", "qkv"): lambda: F.linear(normalised(), weight, bias),
        ("eager", "gate and up"): gated,
        ("eager", "down"): lambda: F.linear(hidden, weight) + residual,
    }[variant, layer]
    measure(f"decode_linear, {layer}, batch {batch}", variant, run, bytes=weight.nbytes)

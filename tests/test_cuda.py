"""What the operators promise of streams and devices. Every test needs a GPU."""

from itertools import chain

import pytest
import torch
from cases import paged, queries

import lil_ops
from lil_ops import _library

OPERATORS = ["append_kv", "score_pages", "select_pages", "sparse_decode", "sparse_decode_step", "information_loss"]

if not (_library.cuda_loaded and torch.cuda.is_available()):
    pytest.skip("needs a GPU", allow_module_level=True)


class Layer:
    """A step's tensors, and the step."""

    def __init__(self, device, seed, length=3000):
        cache = paged(device, [length, 77], kv_heads=2, head_dim=128, dtype=torch.bfloat16, seed=seed)
        q = queries(device, 2, 8, 128, torch.bfloat16, seed)
        k, v = (queries(device, 2, 2, 128, torch.bfloat16, seed + i) for i in (1, 2))
        self.arguments = q, k, v, cache.k, cache.v, cache.summary, cache.page_table, cache.seq_lens
        self.loss = torch.empty(2, 8, device=device)

    def step(self):
        return *lil_ops.sparse_decode_step(*self.arguments, 512, loss=self.loss), self.loss

    def dense(self):
        """Long enough for partial results in scratch."""
        q, _, _, k_cache, v_cache, _, page_table, seq_lens = self.arguments
        return lil_ops.sparse_decode(q, k_cache, v_cache, page_table, seq_lens)


def test_several_streams_at_once():
    layers = [Layer("cuda", seed, 20000) for seed in range(4)]
    want = [[t.clone() for t in (*layer.step(), *layer.dense())] for layer in layers]
    streams = [torch.cuda.Stream() for _ in layers]
    torch.cuda.synchronize()
    for _ in range(30):
        got = []
        for layer, stream in zip(layers, streams, strict=True):
            with torch.cuda.stream(stream):
                got.append([t.clone() for t in (*layer.step(), *layer.dense())])
        torch.cuda.synchronize()
        for a, b in zip(chain(*got), chain(*want), strict=True):
            assert torch.equal(a, b)


def test_the_current_stream_is_used():
    layer = Layer("cuda", 0)
    want = [t.clone() for t in layer.step()]
    q = layer.arguments[0]
    right = q.clone()
    q.zero_()
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):
        torch.cuda._sleep(20_000_000)
        q.copy_(right)
        got = [t.clone() for t in layer.step()]
    torch.cuda.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_nothing_waits_for_the_device():
    layer = Layer("cuda", 0)
    want = [t.clone() for t in (*layer.step(), *layer.dense())]
    torch.cuda.set_sync_debug_mode("error")
    try:
        got = (*layer.step(), *layer.dense())
        with pytest.raises(RuntimeError, match="synchroniz"):  # the mode does find one who waits
            layer.loss.sum().item()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_two_devices():
    first, second = Layer("cuda:0", 5), Layer("cuda:1", 5)
    got = [(*layer.step(), *layer.dense()) for layer in (second, first)]
    assert torch.cuda.current_device() == 0
    for a, b in zip(*got, strict=True):
        assert a.device.index == 1 and torch.equal(a.cpu(), b.cpu())
    second.arguments[-1].fill_(-1)
    second.dense()
    with pytest.raises(RuntimeError, match="seq_lens: expected"):
        lil_ops.check_errors()
    lil_ops.check_errors()

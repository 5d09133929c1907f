"""The fake kernels, with which torch.compile traces: what an operator's results look like."""

from __future__ import annotations

from collections.abc import Callable

import torch

from lil_ops import _library  # noqa: F401  (loads the native operators)


def fake(name: str) -> Callable[[Callable], None]:
    """What tracing runs in place of an operator. A call with one meta tensor comes here too, wherever the others are,
    and would do nothing."""
    names = [argument.name for argument in getattr(torch.ops.lil, name).default._schema.arguments]

    def register(function: Callable) -> None:
        def checked(*args, **options):
            given = dict(zip(names, args, strict=False)) | options
            devices = {argument: value.device for argument, value in given.items() if isinstance(value, torch.Tensor)}
            expected = next(iter(devices.values()))
            for argument, device in devices.items():
                if device != expected:
                    raise RuntimeError(f"lil::{name}: {argument}: expected device {expected}, got {device}")
            return function(*args, **options)

        torch.library.register_fake(f"lil::{name}", checked)

    return register


@fake("append_kv")
def _(k_cache, v_cache, summary, k, v, page_table, seq_lens, cu_seqlens=None, **options):
    return None


@fake("score_pages")
def _(q, summary, page_table, seq_lens, page_size, **options):
    return q.new_empty((q.size(0), summary.size(1), page_table.size(-1)), dtype=torch.float32)


@fake("select_pages")
def _(scores, seq_lens, page_size, budget, *, sink=0, recent=1, protected_lens=None):
    batch, kv_heads, max_pages = scores.shape
    capacity = torch.sym_min(budget // page_size, max_pages)
    return scores.new_empty((batch, kv_heads, capacity), dtype=torch.int32), scores.new_empty(
        (batch, kv_heads), dtype=torch.int32
    )


@fake("sparse_decode")
def _(q, *args, **options):
    return torch.empty(q.shape, dtype=q.dtype, device=q.device), q.new_empty(q.shape[:2], dtype=torch.float32)


@fake("information_loss")
def _(lse, *args, **options):
    return torch.empty(lse.shape, dtype=torch.float32, device=lse.device)


@fake("sparse_decode_step")
def _(q, *args, **options):
    return torch.empty(q.shape, dtype=q.dtype, device=q.device), q.new_empty(q.shape[:2], dtype=torch.float32)


@fake("evict_pages")
def _(held, *args, **options):
    return held.new_empty(held.shape[:2])


@fake("fold_mass")
def _(*args, **options):
    return None


@fake("represent_page")
def _(*args, **options):
    return None


@fake("compact_kv")
def _(k_cache, v_cache, page_table, keep, counts):
    return None


@fake("key_redundancy")
def _(k_cache, page_table, seq_lens, *, threshold=0.5, positions=None):
    slots = page_table.size(-1) * k_cache.size(2)
    return k_cache.new_empty((seq_lens.size(0), k_cache.size(1), slots), dtype=torch.float32)


@fake("decode_linear")
def _(x, weight, bias=None, *, norm=None, eps=1e-6, gated=False, residual=None, cos=None, sin=None, rotated=0):
    return x.new_empty((*x.shape[:-1], weight.size(0) // 2 if gated else weight.size(0)))


@fake("lz77_append")
def _(state, tokens, counts, vocab_size):
    return state.new_empty((state.size(0),)), state.new_empty((state.size(0),))


@fake("guardian_check")
def _(sizes, num_tokens, interval, threshold, checkpoint, gain, stop):
    return None

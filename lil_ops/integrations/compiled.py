"""A decode step under torch.compile: all of a layer's attention is one operator, and the cache stays outside the graph.

What `LilCache` does in Python, tracing would follow into every policy. In a compiled step the model is given a
`StepCache` instead, which holds nothing, and lil_attention puts `attend_token` into the graph. That operator finds the
`LilCache` being served when it runs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from transformers.cache_utils import Cache, CacheLayerMixin

if TYPE_CHECKING:
    from lil_ops.integrations.transformers import LilCache

ENGINES = 1 << 16  # that a process may compile for
_serving: LilCache | None = None


@contextmanager
def serving(cache: LilCache) -> Iterator[None]:
    """In this block `attend_token` writes to and reads from this cache: one at a time in a process."""
    global _serving
    before, _serving = _serving, cache
    try:
        yield
    finally:
        _serving = before


def compiled(function: Callable, **options) -> Callable:
    """A function in one graph; a model with its weights frozen and its linear layers fused. options: of
    `torch.compile`."""
    from torch._inductor import config  # takes seconds to import

    from lil_ops.integrations.fuse_linears import FuseLinears

    # Small kernels that do not need each other's results become one.
    settings = {"combo_kernels": True}
    if isinstance(function, torch.nn.Module):
        settings |= {"freezing": True, "pre_grad_custom_pass": FuseLinears()}
    function = torch.compile(function, **{"fullgraph": True, "dynamic": False} | options)

    def call(*arguments, **inputs):
        # The first call compiles. Dynamo counts the models and numbers of slots of a process together.
        unlimited = torch._dynamo.config.patch(recompile_limit=ENGINES, accumulated_recompile_limit=ENGINES)
        with config.patch(settings), unlimited:
            return function(*arguments, **inputs)

    return call


def in_graph() -> bool:
    """Whether a step is being traced whose attention is to be `attend_token`."""
    return torch.compiler.is_compiling() and _serving is not None


@torch.library.custom_op("lil_cache::attend_token", mutates_args=())
def attend_token(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, layer: int, scale: float | None, window: int, softcap: float
) -> torch.Tensor:
    """``LilCache.attend_token`` of the cache being served. The layers' order is that of their data."""
    return _serving.attend_token(layer, q, k, v, scale, window, softcap)


@attend_token.register_fake
def _(q, k, v, layer, scale, window, softcap):
    return torch.empty(q.shape, dtype=q.dtype, device=q.device)


class StepCache(Cache):
    """What a model under torch.compile takes for its cache in a step of one token a sequence."""

    def __init__(self, num_layers: int):
        super().__init__(layers=[_OneToken() for _ in range(num_layers)])


class _OneToken(CacheLayerMixin):
    is_sliding = False

    def lazy_initialization(self, key_states, value_states):
        pass

    def update(self, key_states, value_states, *args, **kwargs):
        return key_states, value_states

    def get_mask_sizes(self, query_length):
        return query_length, 0

    def get_seq_length(self):
        return 0

    def get_max_length(self):
        return 1

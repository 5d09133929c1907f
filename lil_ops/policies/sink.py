"""Sink (StreamingLLM, Xiao et al., arXiv 2309.17453).

A KV head holds the first `sink` tokens and the most recent ones that the budget leaves room for; the rest is
overwritten. Published: 4 sink tokens, positions counted inside the cache. Here keys keep the positions they were
written with, so that one cache serves every policy; beyond the trained context this is not their extrapolation.
`protect_prompt` holds the whole prompt in place of the sink alone.
"""

from __future__ import annotations

from lil_ops.policies.slots import TokenSlots


class Sink(TokenSlots):
    name = "sink"
    rule = "first `sink` tokens and the most recent"
    source = "StreamingLLM, arXiv 2309.17453"

    def __init__(self, budget=None, *, sink: int = 4, **options):
        super().__init__(budget, sink=sink, **options)

"""A policy in the middle of a long decode, for the benchmarks: its decision alone, without the attention; or, of one
that has a fused step, that, and the attention alone to be taken off.

Shape A: 32 query and 8 KV heads of 128, bf16, pages of 16 tokens, a budget of 1024. What is stored, asked and
attended to is random. Layers that read everything are left out.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from lil_ops import ops, policies
from lil_ops.cache import PagedKVCache
from lil_ops.policies import Chunk

Q_HEADS, KV_HEADS, HEAD_DIM, PAGE_SIZE, BUDGET, PROMPT = 32, 8, 128, 16, 1024, 64
CONTEXTS = (8192, 32768, 131072)
NAMES = [name for name in policies.POLICIES if name != "full"]
# Most policies do the same in every layer. This one selects in two of a model's layers, the others read its choice.
MODEL = {"lessismore": (32, {})}
ONE_OF_A_KIND = {"dense_layers": 0}


class PolicyCase:
    """``batch`` sequences of ``context`` tokens; ``layers`` of the policy, or as many as its model has.

    spare: tokens that are still to come. Attributes: ``layers``, those timed; ``bounded``: what is held does not grow;
    ``fuses``: the policy has a fused step.
    """

    def __init__(self, name: str, batch: int, context: int, *, spare: int, layers: int = 1, device: str = "cpu"):
        num_layers, options = MODEL.get(name, (layers, ONE_OF_A_KIND))
        self.policy = policies.get(name, budget=BUDGET, **options)
        self.bounded = self.policy.memory == "bounded"
        self.fuses = type(self.policy).fused_step is not policies.Policy.fused_step
        tokens = context + spare + (BUDGET if self.bounded else 0)
        self.cache = PagedKVCache(
            num_layers=num_layers,
            kv_heads=KV_HEADS,
            head_dim=HEAD_DIM,
            batch=batch,
            max_tokens=tokens,
            page_size=PAGE_SIZE,
            dtype=torch.bfloat16,
            device=device,
            summary_mode=self.policy.summary_mode,
            vectors=self.policy.vectors,
            rooms=self.policy.rooms(num_layers, tokens, PAGE_SIZE),
        )
        self.layers = [layer for layer in range(num_layers) if not self.policy.reads_all(layer)]
        self._device, self._rows, self._masses, self._reserved = device, list(range(batch)), {}, 0
        torch.manual_seed(0)
        for summary in self.cache.summary:
            # Not twice the same, as keys below: equal scores are harder to select from.
            if summary is not None:
                summary.copy_(torch.randn(summary.shape, device=device))
        self._q = self._random(batch, Q_HEADS, HEAD_DIM)
        self._k, self._v = (self._random(batch, KV_HEADS, HEAD_DIM) for _ in range(2))
        self._start(context)

    def _random(self, *shape: int) -> torch.Tensor:
        return torch.randn(shape, device=self._device).bfloat16()

    def _start(self, context: int) -> None:
        """A short prompt as it comes, and then as if the rest had come and gone: the policy has not seen it."""
        cache, policy = self.cache, self.policy
        policy.begin(cache, [PROMPT] * cache.batch)
        cache.begin_step(self._rows, [PROMPT] * cache.batch, prompt=True)
        if policy.watches_prompt:
            k, v = (self._random(KV_HEADS, PROMPT, HEAD_DIM) for _ in range(2))
            chunk = Chunk(self._random(Q_HEADS, PROMPT, HEAD_DIM), k, v, HEAD_DIM**-0.5, 0.0)
            for layer in self.layers:
                for i in self._rows:
                    policy.keep(layer, i, chunk, cache)
        cache.begin_step(self._rows, [context - PROMPT] * cache.batch, prompt=True)
        cache.prompt_lens.fill_(PROMPT)

    def begin_step(self) -> None:
        self.cache.begin_step(self._rows, [1] * self.cache.batch)
        self._move(-self._reserved)

    def reserve(self, tokens: int) -> None:
        """Map the pages of so many tokens ahead, as steps that are replayed need it."""
        if not self.bounded:
            self.cache.begin_step(self._rows, [tokens] * self.cache.batch)
            self._reserved = tokens

    def advance(self) -> None:
        """Make the present step the next one, on the device: there must be pages."""
        self._move(1)

    def _move(self, tokens: int) -> None:
        step = self.cache.step_of(self.layers[0])
        step.positions.add_(tokens)
        if not self.bounded and step.seq_lens is not step.positions:
            step.seq_lens.add_(tokens)

    def decide(self) -> None:
        """All that the policy does in a step, in each of its layers: write, select, observe."""
        policy, cache = self.policy, self.cache
        for layer in self.layers:
            table, _ = policy.write(layer, self._k, self._v, cache)
            selection = policy.select(layer, self._q, cache, HEAD_DIM**-0.5)
            which = policy.mass_of(layer)
            if which:
                entries = table.shape[-1] if selection is None else selection.pages.shape[-1]
                mass = self._mass(entries * (PAGE_SIZE if which == "token" else 1))
                policy.observe(layer, mass, selection, cache)

    def fused(self) -> None:
        """A whole step by the policy's one operator, in each of its layers: the decision and the attention."""
        for layer in self.layers:
            self.policy.fused_step(
                layer, self._q, self._k, self._v, self.cache, scale=HEAD_DIM**-0.5, softcap=0.0, loss=None
            )

    def attention(self) -> Callable[[], None]:
        """The attention alone, over the pages that the policy reads now, in each of its layers."""
        cache = self.cache
        selections = [self.policy.select(layer, self._q, cache, HEAD_DIM**-0.5) for layer in self.layers]

        def attend() -> None:
            for layer, (pages, counts, _) in zip(self.layers, selections, strict=True):
                step = cache.step_of(layer)
                where = self._q, cache.k[layer], cache.v[layer], step.page_table, step.seq_lens
                ops.sparse_decode(*where, pages, counts, scale=HEAD_DIM**-0.5)

        return attend

    def _mass(self, entries: int) -> torch.Tensor:
        """As attention leaves it, ``[batch, q_heads, entries]``."""
        if entries not in self._masses:
            logits = torch.randn(self.cache.batch, Q_HEADS, entries, device=self._device)
            self._masses[entries] = logits.softmax(-1)
        return self._masses[entries]


class DenseCase:
    """Dense attention over ``context`` tokens, and the plain append of one, in ``layers`` layers."""

    def __init__(self, batch: int, context: int, *, layers: int = 1, device: str = "cpu"):
        self.num_layers = layers
        self.cache = PagedKVCache(
            num_layers=layers, kv_heads=KV_HEADS, head_dim=HEAD_DIM, batch=batch, max_tokens=context,
            page_size=PAGE_SIZE, dtype=torch.bfloat16, device=device,
        )  # fmt: skip
        torch.manual_seed(0)
        for buffer in self.cache.k + self.cache.v:
            block = torch.randn(buffer[:512].shape, device=device)
            for part in buffer.split(512):
                part.copy_(block[: len(part)])
        self._q = torch.randn(batch, Q_HEADS, HEAD_DIM, device=device).bfloat16()
        self._new = torch.randn(batch, KV_HEADS, HEAD_DIM, device=device).bfloat16()
        rows = list(range(batch))
        self.cache.begin_step(rows, [context - 1] * batch)
        self.cache.begin_step(rows, [1] * batch)

    def attend(self) -> None:
        for layer, (k, v) in enumerate(zip(self.cache.k, self.cache.v, strict=True)):
            step = self.cache.step_of(layer)
            ops.sparse_decode(self._q, k, v, step.page_table, step.seq_lens)

    def append(self) -> None:
        for layer in range(len(self.cache.k)):
            self.cache.append(layer, self._new, self._new)

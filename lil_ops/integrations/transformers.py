"""Hugging Face transformers: the attention implementation "lil" and the Cache class that feeds it.

    model.set_attn_implementation("lil")
    cache = LilCache(model, policy="quest", budget=256, batch=1, max_tokens=4096)
    model.generate(**inputs, past_key_values=cache)     # or cache=cache: see `cache_argument`

Without a LilCache, "lil" is dense attention: transformers' own sdpa, or plain PyTorch where a softcap rules sdpa out.
Model code is not patched. A model calls ``cache.update`` and hands the keys it gets back to the attention function, so
`LilCache.update` stores nothing yet: it ties itself to the key tensor. The attention function finds it there, and only
there are the queries and the padding mask at hand that appending (no padding) and selecting pages need.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.cache_utils import Cache, CacheLayerMixin
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from lil_ops import ops, policies
from lil_ops.cache import ALL, PagedKVCache
from lil_ops.integrations import compiled
from lil_ops.integrations.attach import ModelShape, attach, refusal
from lil_ops.policies import Chunk, Policy, Selection

NAME = "lil"

# The attribute by which a key tensor leads from LilCache.update to lil_attention: (cache, layer).
_TIE = "_lil_cache"


def lil_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **kwargs,
) -> tuple[torch.Tensor, None]:
    """transformers' attention function: over the `LilCache` that ``key`` came from, else dense.

    Args:
        query: ``[batch, q_heads, tokens, head_dim]``. key, value: ``[batch, kv_heads, tokens, head_dim]`` as
            ``cache.update`` returned them. attention_mask: ``[batch, 1, tokens, keys]`` bool or None, from "lil"'s mask
            function (transformers' sdpa mask).
        scaling: factor on the logits; default ``head_dim ** -0.5``. dropout: dense path only.
        sliding_window: the last tokens that may be read, current included. softcap: 0 or None is none.

    Returns:
        ``[batch, tokens, q_heads, head_dim]`` (rows of padding hold nothing of meaning), and None for the weights.

    Raises ValueError for attention sinks, and with a LilCache for a position bias.
    """
    if kwargs.get("s_aux") is not None:
        raise ValueError("attention 'lil': learned attention sinks are not supported")
    if compiled.in_graph():
        tokens = query[:, :, 0], key[:, :, 0], value[:, :, 0]
        where = module.layer_idx, scaling, sliding_window or 0, softcap or 0.0
        return compiled.attend_token(*tokens, *where)[:, None], None
    cache, layer = getattr(key, _TIE, (None, None))
    if cache is None:
        return _dense(module, query, key, value, attention_mask, scaling, dropout, softcap, **kwargs), None
    if kwargs.get("position_bias") is not None:
        raise ValueError("attention 'lil': a position bias is not supported with a LilCache")
    out = cache.attend(module, layer, query, key, value, attention_mask, scaling, sliding_window, softcap)
    return out, None


class LilCache(Cache):
    """Keys and values of ``batch`` sequences in pages, and the policy that says which pages a decode step reads.

    For ``model.generate(..., past_key_values=cache)`` with attention "lil". Left-padded batches keep their padding out
    of the cache. For inference only: no beam search, no crop, one generation at a time (`reset` between two).

    Args:
        model: see `attach`. policy: name or `Policy`; ``policy_options`` (budget=..., sink=..., ...) go to it.
        batch: sequences. max_tokens: tokens a sequence may hold, prompt and generated. page_size: tokens.
        num_pages: size of the cache's pools; default: every sequence full.

    Attributes: ``kv`` the `PagedKVCache`, ``policy``, ``shape`` the `ModelShape`; ``rows``, the cache rows that the
    next forward pass serves in the order of its batch (set by a caller who serves a part; all by default);
    ``raised`` ``[batch]`` bool or None, rows that read more than the policy's budget, ``raised_budget`` tokens, or
    where that is None everything (for policies that hold everything); ``lost_bits`` ``[batch]`` float32, once
    `watch_loss` was called: what attention lost in the last step of one token a sequence, in bits. A query head that
    misses a share p of its softmax mass reads a distribution that is ``-log2(1 - p)`` bits (Kullback-Leibler) from the
    true one; this is the mean over all heads and layers.

    Raises ValueError for a model, policy or option that cannot be served, before anything is allocated; in a forward
    pass for a batch of another size, and what `PagedKVCache.begin_step` raises.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        policy: str | Policy = "full",
        *,
        batch: int = 1,
        max_tokens: int,
        page_size: int = 16,
        num_pages: int | None = None,
        **policy_options,
    ):
        self.policy = policies.get(policy, **policy_options)
        self.shape: ModelShape = attach(model)
        super().__init__(layers=[_LayerLength(max_tokens) for _ in range(self.shape.num_layers)])
        # Inside a window every token is read, whatever the policy: the model was trained with that budget.
        windows = self.shape.sliding_windows
        self._managed = [not window and not self.policy.reads_all(i) for i, window in enumerate(windows)]
        rooms = self.policy.rooms(self.shape.num_layers, max_tokens, page_size)
        self.kv = PagedKVCache(
            num_layers=self.shape.num_layers,
            kv_heads=self.shape.kv_heads,
            head_dim=self.shape.head_dim,
            batch=batch,
            max_tokens=max_tokens,
            page_size=page_size,
            num_pages=num_pages,
            dtype=model.dtype,
            device=model.device,
            summary_mode=self.policy.summary_mode,
            vectors=self.policy.vectors,
            summary_dtype=self.policy.summary_dtype,
            rooms=[room if managed else ALL for room, managed in zip(rooms, self._managed, strict=True)],
        )
        self.rows = list(range(batch))
        self.raised: torch.Tensor | None = None
        self.raised_budget: int | None = None
        self.lost_bits: torch.Tensor | None = None
        self._begun = self._in_prompt = False
        self._config = model.config
        # The layer whose keys attention has yet to read, and the one that is to come next.
        self._unread: int | None = None
        self._next = 0
        self._on_device = False

    def begin(self, prompt_lens: list[int]) -> None:
        """Start the policy for prompts of these lengths (tokens). The first forward pass does it where nobody has."""
        self.policy.begin(self.kv, prompt_lens)
        self._begun = True

    def begin_pass(self, rows: list[int]) -> None:
        """The next forward pass is of these rows, and begins with the first layer, also behind one that broke off."""
        self.rows, self._unread, self._next = rows, None, 0

    @contextmanager
    def on_device_steps(self) -> Iterator[None]:
        """In this block, forward passes are of one token in every row, on steps that `DeviceSteps` has installed."""
        self.begin_pass(list(range(self.kv.batch)))
        self._on_device = True
        try:
            with compiled.serving(self):
                yield
        finally:
            self._on_device = False

    def watch_loss(self) -> None:
        """Compute ``lost_bits`` from now on. Raises ValueError for a policy whose loss is not known."""
        if not self.policy.tells_loss:
            raise ValueError(
                f"LilCache: policy {self.policy.name} cannot tell its information loss; quest and full can"
            )
        self.lost_bits = torch.zeros(self.kv.batch, device=self.kv.device)

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args, **kwargs
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Tie ``[batch, kv_heads, tokens, head_dim]`` keys to this cache; `lil_attention` appends and reads them."""
        if self._unread is not None:
            if self._config._attn_implementation == NAME:
                raise self._refusal(f"layer {self._unread} changes its keys behind the cache")
            # Another attention implementation sees the step's own keys only: wrong output, and no error of its own.
            raise RuntimeError(
                f"LilCache: layer {self._unread}'s keys were not read by attention 'lil': "
                "call model.set_attn_implementation('lil') first"
            )
        if layer_idx != self._next:
            raise self._refusal(f"layer {layer_idx} ran where layer {self._next} was expected")
        expected = [key_states.shape[0], self.kv.kv_heads, key_states.shape[2], self.kv.head_dim]
        for shape in map(list, (key_states.shape, value_states.shape)):
            if shape != expected:
                raise self._refusal(f"layer {layer_idx}: keys and values: expected shape {expected}, got {shape}")
        self._unread = layer_idx
        setattr(key_states, _TIE, (self, layer_idx))
        return self.layers[layer_idx].update(key_states, value_states)

    def attend(
        self,
        module: torch.nn.Module,
        layer: int,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        mask: torch.Tensor | None,
        scale: float | None,
        window: int | None,
        softcap: float | None,
    ) -> torch.Tensor:
        """Append one layer's keys and values, then attend; arguments and result as in `lil_attention`."""
        if self._unread != layer:
            raise self._refusal(f"layer {layer} reads its keys more than once")
        self._unread = None
        # Some models put the window into the mask only.
        window = window or self.shape.sliding_windows[layer]
        if layer == 0:
            self._begin_step(key, mask)
        self._next = (layer + 1) % self.shape.num_layers
        # A sequence begins with a chunk, even of one token.
        if key.shape[2] == 1 and not self._was_empty:
            tokens = query[:, :, 0], key[:, :, 0], value[:, :, 0]
            return self._attend_token(layer, *tokens, scale, window, softcap)[:, None]
        scale = self.kv.head_dim**-0.5 if scale is None else scale
        managed = self._managed[layer] and self.policy.watches_prompt
        chunks = self._chunks(layer, query, key, value, scale, softcap) if managed or not self._was_empty else []
        if self._was_empty:
            out = _dense(module, query, key, value, mask, scale, 0.0, softcap)
        else:
            out = self._attend_chunks(query, chunks, window)
        if managed:
            for i, chunk in enumerate(chunks):
                self._keep(layer, i, chunk)
        else:
            self.kv.append(layer, self._tokens(key), self._tokens(value))
        return out

    def attend_token(
        self,
        layer: int,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        scale: float | None,
        window: int,
        softcap: float,
    ) -> torch.Tensor:
        """`attend` for a compiled step (`lil_ops.integrations.compiled`) on device steps: ``[batch, heads, head_dim]``
        each."""
        if layer == 0 and self.lost_bits is not None:
            self.lost_bits.zero_()
        return self._attend_token(layer, q, k, v, scale, window or self.shape.sliding_windows[layer], softcap)

    def reset(self) -> None:
        """Forget every sequence, and serve all rows again; the buffers stay."""
        super().reset()
        self.rows = list(range(self.kv.batch))
        for row in self.rows:
            self.kv.free(row)
        self._begun = self._in_prompt = False
        self._unread, self._next = None, 0

    def _refusal(self, reason: str) -> ValueError:
        return refusal(self._config.model_type, reason)

    def _begin_step(self, key: torch.Tensor, mask: torch.Tensor | None) -> None:
        """Open the step that all layers share: find the real tokens, map pages for them, start the policy."""
        batch, _, tokens, _ = key.shape
        if self.lost_bits is not None:
            self.lost_bits.zero_()
        if self._on_device:
            self._was_empty, self._valid = False, None
            return
        if batch != len(self.rows):
            raise ValueError(f"LilCache: batch: expected {len(self.rows)} sequences, got {batch}")
        self._valid, counts = None, [tokens] * batch
        if mask is not None:
            if mask.dtype != torch.bool or mask.shape[-2:] != (tokens, tokens):
                raise ValueError(
                    f"LilCache: attention_mask: expected [batch, tokens], padding only; got a mask that became "
                    f"{mask.dtype} of shape {list(mask.shape)} for {tokens} new tokens"
                )
            # A token may read itself unless it is padding.
            valid = mask[:, 0].diagonal(dim1=-2, dim2=-1)
            real = valid.sum(1).tolist()
            if real != counts:
                self._valid, counts = valid, real
        lengths = [self.kv.lengths[row] for row in self.rows]
        self._was_empty = not any(lengths)
        prompt = tokens > 1 or self._was_empty
        if not self._begun:
            self.begin(counts)
        elif self._in_prompt and not prompt:
            # Only now are prompts that came in chunks known whole.
            self.policy.check_budget(self.kv, lengths)
        self._in_prompt = prompt
        self.kv.begin_step(self.rows, counts, prompt=prompt)

    def _tokens(self, states: torch.Tensor) -> torch.Tensor:
        """``[batch, kv_heads, tokens, head_dim]`` -> ``[real tokens, kv_heads, head_dim]``, sequence after sequence."""
        states = states.transpose(1, 2)
        return states.flatten(0, 1) if self._valid is None else states[self._valid]

    def _attend_token(
        self,
        layer: int,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        scale: float | None,
        window: int | None,
        softcap: float | None,
    ) -> torch.Tensor:
        """One token a sequence, ``[batch, heads, head_dim]``: write, select, attend, observe."""
        kv, policy, managed = self.kv, self.policy, self._managed[layer]
        selection, mass = None, {}
        if managed:
            out = None if window else self._fused(layer, q, k, v, scale, softcap or 0.0)
            if out is not None:
                return out
            page_table, seq_lens = policy.write(layer, k, v, kv)
            selection = self._with_raised(layer, policy.select(layer, q, kv, scale))
            mass = self._room_for_mass(layer, q, page_table, selection)
        else:
            kv.append(layer, k, v)
            page_table, seq_lens = kv.step_of(layer).page_table, kv.step_of(layer).seq_lens
        out, lse = ops.sparse_decode(
            q,
            kv.k[layer],
            kv.v[layer],
            page_table,
            seq_lens,
            *(selection[:2] if selection else ()),
            scale=scale,
            window=window or 0,
            softcap=softcap or 0.0,
            **mass,
        )
        if mass:
            policy.observe(layer, *mass.values(), selection, kv)
        if self.lost_bits is not None and selection is not None:
            pages, counts, scores = selection
            cap = softcap or 0.0
            self._add_loss(layer, ops.information_loss(lse, scores, seq_lens, kv.page_size, pages, counts, softcap=cap))
        return out

    def _fused(
        self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float | None, softcap: float
    ) -> torch.Tensor | None:
        """`_attend_token` by the policy's fused step; None where there is none for this layer and step."""
        every_row = self.kv.step_of(layer).cu_seqlens is None
        if not every_row or self.raised is not None or self.policy.mass_of(layer) is not None:
            return None
        loss = None if self.lost_bits is None else torch.empty(q.shape[:2], device=q.device)
        out = self.policy.fused_step(layer, q, k, v, self.kv, scale=scale, softcap=softcap, loss=loss)
        if out is not None and loss is not None:
            self._add_loss(layer, loss)
        return out

    def _add_loss(self, layer: int, loss: torch.Tensor) -> None:
        """Add a layer's ``loss [batch, q_heads]`` to ``lost_bits``."""
        step = self.kv.step_of(layer)
        bits = step.take(self.lost_bits)
        bits += bits_of(loss).mean(1) / self.shape.num_layers
        step.put(self.lost_bits, bits)

    def _with_raised(self, layer: int, selection: Selection | None) -> Selection | None:
        """The selection, in which the rows of ``raised`` have more."""
        if selection is None or self.raised is None:
            return selection
        step, size, (pages, counts, scores) = self.kv.step_of(layer), self.kv.page_size, selection
        capacity = step.page_table.shape[-1]
        if self.raised_budget is None:
            more = torch.arange(capacity, dtype=torch.int32, device=pages.device).expand(*pages.shape[:2], -1)
            more_counts = (step.seq_lens + size - 1).div(size, rounding_mode="floor")[:, None].expand_as(counts)
        else:
            budget = max(self.raised_budget, self.policy.budget_of(layer))
            more, more_counts = self.policy.best_pages(layer, scores, self.kv, budget)
        which = step.take(self.raised)[:, None]
        pages, more = (F.pad(some, (0, capacity - some.shape[-1]), value=-1) for some in (pages, more))
        return Selection(
            torch.where(which[..., None], more, pages), torch.where(which, more_counts, counts).int(), scores
        )

    def _room_for_mass(
        self, layer: int, q: torch.Tensor, page_table: torch.Tensor, selection: Selection | None
    ) -> dict[str, torch.Tensor]:
        """The output of `ops.sparse_decode` that the policy observes, by name."""
        which = self.policy.mass_of(layer)
        if which is None:
            return {}
        entries = page_table.shape[-1] if selection is None else selection.pages.shape[-1]
        size = entries * (self.kv.page_size if which == "token" else 1)
        return {f"{which}_mass": torch.empty(*q.shape[:2], size, device=q.device)}

    def _chunks(
        self,
        layer: int,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        scale: float,
        softcap: float | None,
    ) -> list[Chunk]:
        """Each sequence's queries, without padding, and its keys and values: those held, and then its new ones."""
        chunks = []
        for i, held in enumerate(self.kv.step_of(layer).held):
            real = slice(None) if self._valid is None else self._valid[i]
            k, v = key[i][:, real], value[i][:, real]
            if held:
                old = self.kv.gather(layer, i, held)
                k, v = torch.cat([old[0], k], 1), torch.cat([old[1], v], 1)
            chunks.append(Chunk(query[i][:, real], k, v, scale, softcap or 0.0))
        return chunks

    def _attend_chunks(self, query: torch.Tensor, chunks: list[Chunk], window: int | None) -> torch.Tensor:
        """Several tokens behind cached ones: dense, sequence by sequence."""
        out = torch.zeros_like(query)
        for i, chunk in enumerate(chunks):
            places = torch.arange(chunk.k.shape[1], device=query.device)
            queries = places[len(places) - chunk.q.shape[1] :, None]
            mask = places <= queries
            if window:
                mask &= places > queries - window
            real = slice(None) if self._valid is None else self._valid[i]
            attended = _attention(
                *(t[None] for t in (chunk.q, chunk.k, chunk.v, mask[None])), chunk.scale, chunk.softcap
            )
            out[i][:, real] = attended[0]
        return out.transpose(1, 2)

    def _keep(self, layer: int, i: int, chunk: Chunk) -> None:
        """Store of one sequence's keys and values what the policy keeps."""
        step, new = self.kv.step_of(layer), chunk.q.shape[1]
        if new == 0:
            return
        kept = self.policy.keep(layer, i, chunk, self.kv)
        if kept is None:
            k, v = chunk.k[:, -new:], chunk.v[:, -new:]
        else:
            places = kept[..., None].expand(-1, -1, self.kv.head_dim)
            k, v = chunk.k.gather(1, places), chunk.v.gather(1, places)
        self.kv.append(
            layer,
            k.transpose(0, 1),
            v.transpose(0, 1),
            page_table=step.page_table[i : i + 1],
            seq_lens=step.seq_lens[i : i + 1],
            cu_seqlens=torch.tensor([0, k.shape[1]], dtype=torch.int32, device=k.device),
        )


class _LayerLength(CacheLayerMixin):
    """What transformers asks of one layer: how many tokens it has seen, padding included."""

    is_sliding = False
    supports_early_init = False

    def __init__(self, max_tokens: int):
        super().__init__()
        self.max_tokens, self.seen = max_tokens, 0

    def lazy_initialization(self, key_states, value_states):
        pass

    def update(self, key_states, value_states, *args, **kwargs):
        self.seen += key_states.shape[2]
        return key_states, value_states

    def get_mask_sizes(self, query_length):
        # The mask covers the step's own tokens; the page table knows which tokens came before.
        return query_length, self.seen

    def get_seq_length(self):
        return self.seen

    def get_max_length(self):
        return self.max_tokens

    def reset(self):
        self.seen = 0

    def _unsupported(self, *args):
        raise NotImplementedError("LilCache: beam search, several sequences a prompt and rollback are not supported")

    reorder_cache = crop = batch_repeat_interleave = batch_select_indices = _unsupported


def _dense(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    scale: float | None,
    dropout: float,
    softcap: float | None,
    **kwargs,
) -> torch.Tensor:
    """Dense attention of a model that keeps its own keys; shapes as in `lil_attention`."""
    if not softcap:
        return sdpa_attention_forward(module, query, key, value, mask, dropout=dropout, scaling=scale, **kwargs)[0]
    if mask is None and query.shape[2] > 1:
        mask = torch.ones(query.shape[2], key.shape[2], dtype=torch.bool, device=key.device).tril()
    return _attention(query, key, value, mask, scale, softcap, dropout).transpose(1, 2)


def _attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    scale: float | None,
    softcap: float | None,
    dropout: float = 0.0,
) -> torch.Tensor:
    """Attention under a bool mask (True: read), ``[batch, q_heads, tokens, head_dim]`` out; KV heads serve groups."""
    if not softcap:
        return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scale, enable_gqa=True)
    group = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(group, dim=1), value.repeat_interleave(group, dim=1)
    scores = query @ key.transpose(2, 3) * (query.shape[-1] ** -0.5 if scale is None else scale)
    scores = torch.tanh(scores / softcap) * softcap
    if mask is not None:
        # The lowest finite value, not -inf: a query that is padding reads nothing, and must not become NaN.
        scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
    weights = F.softmax(scores, dim=-1, dtype=torch.float32).to(query.dtype)
    return F.dropout(weights, dropout, training=dropout > 0) @ value


def bits_of(loss: torch.Tensor) -> torch.Tensor:
    """Shares of softmax mass that were missed, in bits: see `LilCache`."""
    # A share of 1 in float32 is one of at least 1 - 2**-25.
    return -torch.log2(1 - loss.clamp(max=1 - 2**-24))


def cache_argument(model: torch.nn.Module) -> str:
    """The name by which the model's forward and generate take a cache.

    transformers renames ``past_key_values`` to ``cache`` within 5.x: older versions do not know the new name, newer
    ones warn of the old.
    """
    return "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"


def register() -> None:
    """Make ``attn_implementation="lil"`` known to transformers; importing this module does it. Safe to repeat."""
    AttentionInterface.register(NAME, lil_attention)
    AttentionMaskInterface.register(NAME, sdpa_mask)


register()

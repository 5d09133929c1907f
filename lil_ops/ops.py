"""The operators: typed wrappers with their documentation.

Every wrapper calls ``torch.ops.lil.<name>``, which can be used directly. ``lil_ops.reference`` defines each result in
plain float64 PyTorch. Shapes name: ``batch`` sequences, ``q_heads = group * kv_heads``, ``head_dim`` in 64, 80, 96,
128, 192, 256, ``page_size`` a power of two from 8 to 128. Lengths, tables and page ids are int32; caches and queries
fp32, fp16 or bf16 (they may differ), and caches may be float8_e4m3fn; arithmetic is fp32.

A float8 cache holds ``x / scale``. ``k_scale`` and ``v_scale`` are the scales: float32, ``[kv_heads]``, or
``[num_pages, kv_heads]`` with one for each physical page, all positive; None: 1. Operators only read them. The caller
sets a page's scales before its first token is appended and leaves them alone while the page is in use. With another
cache dtype a scale is an error, also where its summaries are float8: those hold plain values.

Errors: a wrong shape, dtype, device, stride or option raises RuntimeError ``lil::OPERATOR: ARGUMENT: expected ..., got
...`` and nothing is written. On the CPU so do lengths, page ids and token ids out of range.

There is no autograd: no gradient flows through an operator, and torch does not learn that what it writes has changed.

A page table is ``[batch, max_pages]``, or ``[batch, kv_heads, max_pages]`` where heads have tables of their own:
logical page of the sequence -> physical page of the cache, or -1: not mapped. Such a page scores -inf, and attention
skips it; appending to it is an error. ``seq_lens`` always counts the tokens of the step at hand, appended or about to
be, and those of pages that are not mapped.
"""

from __future__ import annotations

import torch

from lil_ops import fakes  # noqa: F401  (loads the native operators, and what stands for them in tracing)

_lil = torch.ops.lil


def append_kv(
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    summary: torch.Tensor | None,
    k: torch.Tensor,
    v: torch.Tensor,
    page_table: torch.Tensor,
    seq_lens: torch.Tensor,
    cu_seqlens: torch.Tensor | None = None,
    *,
    summary_mode: str = "minmax",
    k_scale: torch.Tensor | None = None,
    v_scale: torch.Tensor | None = None,
    slots: torch.Tensor | None = None,
) -> None:
    """Write new tokens' keys and values into the paged cache and renew the summaries of the pages they touch.

    Args:
        k_cache, v_cache: ``[num_pages, kv_heads, page_size, head_dim]``, last dimension contiguous, other strides any
            (an NHD buffer works as a view); written.
        summary: ``[num_pages, kv_heads, 2, head_dim]`` in the cache's dtype or float8_e4m3fn, last two dimensions
            contiguous; written; or None. After the call each touched page's summary is that of the tokens it holds, as
            they are stored (float8: before the scale).
        k, v: ``[tokens, kv_heads, head_dim]`` in the cache's dtype; for a float8 cache fp32, fp16 or bf16, both the
            same.
        page_table: see the module. seq_lens: ``[batch]``, the new tokens included: they take the last places.
        cu_seqlens: ``[batch + 1]`` offsets of each sequence's new tokens in k and v; None: one token a sequence, and a
            sequence of length 0 takes no part.
        summary_mode: what a summary holds: ``"minmax"``, the exact min and max of each element; ``"meanstd"``, its mean
            and population standard deviation. ``"representative"`` is refused: which keys represent a page is for the
            policy to say, see `represent_page`. A float8 summary of a wider cache has the largest float8 value that is
            not above the min, and the smallest that is not below the max, so that they stay bounds; NaN where there is
            none (a min below -448, a max above 448). Means and deviations are rounded to nearest and saturate.
        k_scale, v_scale: see the module. A float8 cache stores ``k / scale``, divided in float32, rounded to nearest
            even, and saturated at +-448, infinities too; NaN stays NaN. (torch's own conversion may give NaN for what
            is too large.)
        slots: ``[batch, kv_heads]`` int32, without ``cu_seqlens``: head h of sequence b writes its token at place
            ``slots[b, h]``, less than ``seq_lens[b]``, over what was there; -1: the last place. None: all -1.

    Equivalent PyTorch, for sequence b with n new tokens::

        for j in range(n):
            page, slot = divmod(int(seq_lens[b]) - n + j, page_size)
            k_cache[page_table[b, page], :, slot] = k[cu_seqlens[b] + j]     # v likewise
        summary[page_table[b, page]] = stack([keys.amin(1), keys.amax(1)], 1)  # keys: the page's valid tokens
        # meanstd: keys.mean(1), keys.std(1, correction=0)
        # float8 summaries of a wider cache: min rounded down, max rounded up
        # slots: for head h, page, slot = divmod(int(slots[b, h]), page_size)
    """
    _lil.append_kv(
        k_cache,
        v_cache,
        summary,
        k,
        v,
        page_table,
        seq_lens,
        cu_seqlens,
        summary_mode=summary_mode,
        k_scale=k_scale,
        v_scale=v_scale,
        slots=slots,
    )


def score_pages(
    q: torch.Tensor,
    summary: torch.Tensor,
    page_table: torch.Tensor,
    seq_lens: torch.Tensor,
    page_size: int,
    *,
    scale: float | None = None,
    summary_mode: str = "minmax",
    k_scale: torch.Tensor | None = None,
) -> torch.Tensor:
    """Score every page of every sequence for every KV head: how much attention it may receive.

    Args:
        q: ``[batch, q_heads, head_dim]``. page_table, seq_lens: see the module.
        summary: as in `append_kv`; in mode representative ``[num_pages, kv_heads, r, head_dim]``, r from 1 to 16, last
            two dimensions contiguous.
        scale: positive factor on the logits; default ``head_dim ** -0.5``, so that scores are in the units of
            `sparse_decode`'s lse.
        summary_mode: ``"minmax"`` is Quest's upper bound (Tang et al., arXiv 2406.10774): no key of the page has a
            larger ``scale * q . k`` for any query head of the group. ``"meanstd"`` estimates the log of the mean of
            ``exp(scale * q . k)`` over the page's keys, as if they were normal with independent elements: the score
            plus the log of the number of tokens estimates the page's own lse. It bounds nothing.
            ``"representative"`` is InfLLM's (Xiao et al., arXiv 2402.04617): the mean of ``scale * q . k`` over the
            query heads of the group and the page's r representative keys, which the caller keeps; a page with fewer
            tokens than r repeats some.
        k_scale: the scales of float8 keys, see the module; None where only their summary is float8.

    Returns:
        ``[batch, kv_heads, max_pages]`` float32; pages past the end of a sequence, or not mapped, are -inf.

    Equivalent PyTorch, for KV head h and page p of sequence b::

        low, high = summary[page_table[b, p], h]
        score = scale * maximum(q[b, group] * low, q[b, group] * high).sum(-1).max()
        # meanstd: mean, std = summary[page_table[b, p], h]
        score = (scale * q[b, group] @ mean + 0.5 * scale**2 * q[b, group] ** 2 @ std**2).max()
        # representative:
        score = scale * (q[b, group] @ summary[page_table[b, p], h].T).mean()
        # float8 keys: scale * k_scale of the page stands for scale
    """
    return _lil.score_pages(
        q, summary, page_table, seq_lens, page_size, scale=scale, summary_mode=summary_mode, k_scale=k_scale
    )


def select_pages(
    scores: torch.Tensor,
    seq_lens: torch.Tensor,
    page_size: int,
    budget: int,
    *,
    sink: int = 0,
    recent: int = 1,
    protected_lens: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Choose the pages that each KV head reads, within an exact budget.

    Always in: the pages of the last ``recent`` tokens, then those of the first ``sink`` tokens (``protected_lens[b]``
    tokens where that is more). The rest of the budget goes to the highest scores; among equals the earlier page wins,
    NaN ranks highest as in torch.topk. A sequence of no more pages than the budget is read whole.

    Args:
        scores: ``[batch, kv_heads, max_pages]`` float32, last dimension contiguous. seq_lens: ``[batch]``.
        budget: tokens a KV head may read, everything included; whole pages are counted, so ``budget // page_size``.
        protected_lens: ``[batch]`` int32; what does not fit in the budget is not protected.

    Returns:
        pages ``[batch, kv_heads, min(budget // page_size, max_pages)]`` int32, ascending, -1 padded; counts
        ``[batch, kv_heads]`` int32.

    Equivalent PyTorch, for one head of more ``pages`` than the budget, whose scores are all different and none NaN
    (which topk would rank above the forced pages)::

        scores[forced] = inf
        scores[:pages].topk(budget // page_size).indices.sort().values
    """
    return _lil.select_pages(
        scores, seq_lens, page_size, budget, sink=sink, recent=recent, protected_lens=protected_lens
    )


def sparse_decode(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    page_table: torch.Tensor,
    seq_lens: torch.Tensor,
    pages: torch.Tensor | None = None,
    counts: torch.Tensor | None = None,
    *,
    scale: float | None = None,
    window: int = 0,
    softcap: float = 0.0,
    k_scale: torch.Tensor | None = None,
    v_scale: torch.Tensor | None = None,
    page_mass: torch.Tensor | None = None,
    token_mass: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention of one query token a sequence over the selected pages of a paged cache, or over all of them.

    Args:
        q: ``[batch, q_heads, head_dim]``. k_cache, v_cache: as in `append_kv`. page_table, seq_lens: see the module.
        pages: ``[batch, kv_heads, capacity]`` logical pages each KV head reads, -1 skipped; None: every page. A page
            listed twice is read twice, one that is not mapped not at all.
        counts: ``[batch, kv_heads]`` entries of each list that count; None: all.
        scale: factor on the logits; default ``head_dim ** -0.5``.
        window: only the last ``window`` tokens of a sequence may be read (sliding-window layers); 0: no limit.
        softcap: logits become ``softcap * tanh(logit / softcap)`` (Gemma 2); 0: they stay.
        k_scale, v_scale: the scales of a float8 cache, see the module.
        page_mass: ``[batch, q_heads, capacity]`` float32, contiguous; written; or None. The share of the softmax mass
            that was read which each entry of the list has, in the order of the list; without a list, each page of the
            table. 0 for entries of which nothing is read. Every element is written.
        token_mass: ``[batch, q_heads, capacity * page_size]``, the same of each token of each entry. With or without
            them, out and lse have the same bits.

    Returns:
        out ``[batch, q_heads, head_dim]`` in q's dtype; lse ``[batch, q_heads]`` float32, natural log of the sum of
        exponentials of the logits read. A query head that reads nothing, or logits of -inf only, has out 0 and lse
        -inf. The result does not depend on the number of threads, and a list of all pages gives the bits that None
        gives.

    Equivalent PyTorch, for query head i of KV head h::

        k = k_cache[page_table[b, pages[b, h]], h].flatten(0, 1)    # v likewise; tokens past seq_lens[b] left out
        logits = scale * (k @ q[b, i])
        out, lse = logits.softmax(0) @ v, logits.logsumexp(0)
        token_mass = exp(logits - lse)
        page_mass = token_mass.view(-1, page_size).sum(-1)
    """
    return _lil.sparse_decode(
        q,
        k_cache,
        v_cache,
        page_table,
        seq_lens,
        pages,
        counts,
        scale=scale,
        window=window,
        softcap=softcap,
        k_scale=k_scale,
        v_scale=v_scale,
        page_mass=page_mass,
        token_mass=token_mass,
    )


def information_loss(
    lse: torch.Tensor,
    scores: torch.Tensor,
    seq_lens: torch.Tensor,
    page_size: int,
    pages: torch.Tensor,
    counts: torch.Tensor | None = None,
    *,
    softcap: float = 0.0,
) -> torch.Tensor:
    """The share of softmax mass on the pages that were not read, from the lse of those that were and scores of the
    others.

    With minmax scores of the same scale it is an upper bound, for every query head. With meanstd scores it is an
    estimate; a group's score is its highest head's, so it leans upwards.

    Args:
        lse: ``[batch, q_heads]`` float32, contiguous, of `sparse_decode` over ``pages`` (each listed once), without a
            window. scores: ``[batch, kv_heads, max_pages]`` float32 of `score_pages`, last dimension contiguous; -inf
            is a page that is not mapped, which adds nothing. seq_lens: ``[batch]``.
        pages, counts: what was read, as in `sparse_decode`; in any order.
        softcap: that of `sparse_decode`; scores are without it.

    Returns:
        ``[batch, q_heads]`` float32, 0 to 1. 0 where every page was read; 1 where a head read nothing (lse -inf) and
        there was something to read.

    Equivalent PyTorch, for query head i of KV head h::

        unread = [p for p in range(num_pages) if p not in pages[b, h, : counts[b, h]]]
        mass = (tokens[unread] * exp(scores[b, h, unread])).sum()     # tokens: how many each page holds
        loss = mass / (mass + exp(lse[b, i]))                         # computed from logarithms
    """
    return _lil.information_loss(lse, scores, seq_lens, page_size, pages, counts, softcap=softcap)


def sparse_decode_step(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    summary: torch.Tensor,
    page_table: torch.Tensor,
    seq_lens: torch.Tensor,
    budget: int,
    *,
    sink: int = 0,
    recent: int = 1,
    protected_lens: torch.Tensor | None = None,
    scale: float | None = None,
    softcap: float = 0.0,
    summary_mode: str = "minmax",
    k_scale: torch.Tensor | None = None,
    v_scale: torch.Tensor | None = None,
    loss: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """One decode step of a layer, the fast path: append one token a sequence, score, select and attend.

    The arguments are those of `append_kv`, `score_pages`, `select_pages` and `sparse_decode`, and so is the result, bit
    for bit. On CUDA (Hopper and newer) it takes two launches for most shapes: append and score, then select and attend.

    Args:
        q: ``[batch, q_heads, head_dim]``. k, v: ``[batch, kv_heads, head_dim]`` of the new token, as in `append_kv`.
        k_cache, v_cache, summary: as in `append_kv`; written. seq_lens: ``[batch]``, the new token counted; a sequence
            of length 0 takes no part (its out is 0, its lse -inf and its loss 0). budget, sink, recent,
            protected_lens: as in `select_pages`.
        k_scale, v_scale: the scales of a float8 cache, see the module.
        loss: ``[batch, q_heads]`` float32, contiguous; written; or None. `information_loss` of this step's lse, scores
            and selection (on CUDA its sum may differ in the last bits).

    Returns:
        out ``[batch, q_heads, head_dim]`` in q's dtype; lse ``[batch, q_heads]`` float32, as `sparse_decode`.

    Equivalent PyTorch::

        append_kv(k_cache, v_cache, summary, k, v, page_table, seq_lens)
        scores = score_pages(q, summary, page_table, seq_lens, page_size, scale=scale)
        pages, counts = select_pages(scores, seq_lens, page_size, budget, sink=sink, recent=recent)
        out, lse = sparse_decode(q, k_cache, v_cache, page_table, seq_lens, pages, counts, scale=scale)
        loss = information_loss(lse, scores, seq_lens, page_size, pages, counts)
        return out, lse
    """
    return _lil.sparse_decode_step(
        q,
        k,
        v,
        k_cache,
        v_cache,
        summary,
        page_table,
        seq_lens,
        budget,
        sink=sink,
        recent=recent,
        protected_lens=protected_lens,
        scale=scale,
        softcap=softcap,
        summary_mode=summary_mode,
        k_scale=k_scale,
        v_scale=v_scale,
        loss=loss,
    )


def evict_pages(
    held: torch.Tensor,
    priority: torch.Tensor,
    seq_lens: torch.Tensor,
    page_size: int,
    *,
    sink: int = 0,
    recent: int = 1,
    protected_lens: torch.Tensor | None = None,
    page_table: torch.Tensor | None = None,
    slot_pages: torch.Tensor | None = None,
) -> torch.Tensor:
    """Make room for each sequence's newest token where heads hold a fixed number of pages: evicting is overwriting.

    Each KV head holds at most ``capacity`` pages of a sequence, in slots. A head that does not hold the newest token's
    page puts it into a free slot, else into that of the page with the lowest priority (among equals the earlier page;
    NaN is never lower). Not to go are the pages of the last ``recent`` tokens and of the first ``sink``
    (``protected_lens[b]``) tokens; where only such are left, the last of the latter goes: what does not fit is not
    protected. Call it before `append_kv`.

    With a table, a slot is a page of the cache, and the table follows. Without one, it is whatever the caller keeps in
    slots; with a ``page_size`` of 1 it is a token, and what is returned are ``slots`` for `append_kv`.

    Args:
        held: ``[batch, kv_heads, capacity]`` int32 logical pages, -1: free; written. It is a list of pages for
            `sparse_decode`, whose ``page_mass`` then lies beside it.
        priority: as ``held``, float32.
        seq_lens: ``[batch]``, tokens of the sequence, the newest counted (not those that are held).
        page_size: as in the module; without a table also 1.
        protected_lens: ``[batch]`` int32.
        page_table: ``[batch, kv_heads, max_pages]`` int32, last dimension contiguous; written: the opened page's entry
            becomes its slot's physical page, the evicted one's -1; or None.
        slot_pages: ``[batch, capacity]`` int32 physical pages, the same for all heads; with ``page_table`` only. All
            but the table are contiguous.

    Returns:
        slots ``[batch, kv_heads]`` int32: the slot that was filled, where whatever is kept beside ``held`` begins anew;
        -1: nothing was to do.

    Also RuntimeError, and nothing was written: a capacity smaller than the pages that sink and recent can touch; on the
    CPU a length, held page or slot page out of range.

    Equivalent PyTorch, for one head that holds no free slot and not ``page = (seq_lens[b] - 1) // page_size``::

        slot = priority[b, h].masked_fill(always_kept, inf).argmin()
        page_table[b, h, held[b, h, slot]] = -1
        held[b, h, slot] = page
        page_table[b, h, page] = slot_pages[b, slot]
    """
    return _lil.evict_pages(
        held,
        priority,
        seq_lens,
        page_size,
        sink=sink,
        recent=recent,
        protected_lens=protected_lens,
        page_table=page_table,
        slot_pages=slot_pages,
    )


def fold_mass(
    priority: torch.Tensor,
    mass: torch.Tensor,
    held: torch.Tensor,
    seq_lens: torch.Tensor,
    page_size: int,
    *,
    rule: str = "sum",
    shared: bool = False,
    share: float = 0.5,
) -> None:
    """Make of the softmax mass of what was read the priorities by which `evict_pages` lets go. After the attention.

    The mass m of a slot is the sum over the query heads of its KV head, or, ``shared``, over all query heads. A slot is
    *begun* where the newest token is the first of what it holds: what was in it before does not count.

    - ``"sum"`` (H2O): m is added; where the slot is begun, the priority is m.
    - ``"last"`` (TOVA): the priority is m.
    - ``"stamp"`` (RaaS): the priority is ``seq_lens[b]`` where the slot is begun, or is among the top ``share`` of the
      head's slots that hold something: where fewer than ``share`` times their number have more mass. Else it stays.

    Args:
        priority: ``[batch, kv_heads, capacity]`` float32; written.
        mass: ``[batch, q_heads, entries]`` float32, of `sparse_decode` over the slots: entry s is slot s. Past its end
            the mass is 0; entries past the slots are not looked at.
        held, seq_lens, page_size: those of `evict_pages`, which came before. All are contiguous.
        share: above 0 and up to 1; for ``"stamp"`` alone.

    A sequence of length 0 takes no part. On CUDA ``"stamp"`` takes up to 8192 slots.

    Equivalent PyTorch for ``"sum"``::

        begun = held * page_size + 1 == seq_lens[:, None, None]
        priority.masked_fill_(begun, 0).add_(mass.unflatten(1, (kv_heads, -1)).sum(2))
    """
    _lil.fold_mass(priority, mass, held, seq_lens, page_size, rule=rule, shared=shared, share=share)


def represent_page(
    summary: torch.Tensor,
    weight: torch.Tensor,
    k_cache: torch.Tensor,
    page_table: torch.Tensor,
    seq_lens: torch.Tensor,
    mass: torch.Tensor,
    pages: torch.Tensor,
    counts: torch.Tensor | None = None,
    *,
    recent: int,
    representatives: int,
) -> None:
    """InfLLM's local window, the last ``recent`` tokens, moves on by one (Xiao et al., arXiv 2402.04617). After the
    attention.

    A token gathers weight while it is inside the window: the softmax mass that the step gave it, summed over the group.
    A page is represented by the mean of its heaviest keys, from the moment that the next token's window leaves all of
    it out: then no more can come to it. So a page's summary is written once, and may be scored with in mode
    representative (`score_pages`) from the next step on.

    Args:
        summary: ``[num_pages, kv_heads, 1, head_dim]`` in the cache's dtype or float8_e4m3fn; written where a page
            leaves the window, rounded to nearest.
        weight: ``[batch, kv_heads, max_pages * page_size]`` float32, contiguous, of each token of a sequence; written.
        k_cache: as in `append_kv`. Means of float8 keys are of the stored values. page_table, seq_lens: see the module;
            a page that is not mapped is not represented, and a sequence of length 0 takes no part.
        mass: ``[batch, q_heads, capacity * page_size]`` float32, contiguous: ``token_mass`` of `sparse_decode`.
        pages, counts: what was read, as there; each page listed once.
        recent: at least 1. representatives: 1 to 16, and no more than a page has: so many of its tokens with the
            largest weights, of equals the earlier; NaN is largest.

    Equivalent PyTorch, for KV head h of sequence b with n tokens, and for each ``entry`` of its list::

        tokens = pages[b, h, entry] * page_size + arange(page_size)
        got = mass[b, group, entry * page_size : (entry + 1) * page_size].sum(0)
        inside = (tokens >= n - recent) & (tokens < n)
        weight[b, h, tokens[inside]] += got[inside]

        page, rest = divmod(n + 1 - recent, page_size)
        if page > 0 and rest == 0:
            best = weight[b, h, (page - 1) * page_size : page * page_size].topk(representatives).indices
            summary[page_table[b, page - 1], h] = k_cache[page_table[b, page - 1], h, best].mean(0)
    """
    _lil.represent_page(
        summary,
        weight,
        k_cache,
        page_table,
        seq_lens,
        mass,
        pages,
        counts,
        recent=recent,
        representatives=representatives,
    )


def compact_kv(
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    page_table: torch.Tensor,
    keep: torch.Tensor,
    counts: torch.Tensor,
) -> None:
    """Move the kept slots of each KV head to the front of its sequence's pages, in place, in their order.

    A slot is a place of a sequence: page ``slot // page_size`` of its table. It moves bytes: stored values stay as they
    are, so float8 pages between which a slot moves must share their scales (``[kv_heads]``, or None). Summaries are not
    renewed. What lies behind the kept slots stays, and means nothing any more; pages can be given back.

    Args:
        k_cache, v_cache: as in `append_kv`; written. page_table: see the module. No two sequences may share a page.
        keep: ``[batch, kv_heads, capacity]`` int32, last dimension contiguous: the slots to keep, strictly ascending.
        counts: ``[batch]`` int32, how many of them count, the same for all heads; what lies behind is not looked at. 0
            leaves the sequence alone.

    Also RuntimeError, and nothing was written: a count out of range; slots that do not ascend or lie past the table; a
    slot of a page that is not mapped. On CUDA such a head is left alone.

    Equivalent PyTorch, for KV head h of sequence b::

        slots = keep[b, h, : counts[b]]
        page, slot = page_table[b, slots // page_size], slots % page_size
        to_page, to_slot = page_table[b, arange(counts[b]) // page_size], arange(counts[b]) % page_size
        k_cache[to_page, h, to_slot] = k_cache[page, h, slot]     # v likewise
    """
    _lil.compact_kv(k_cache, v_cache, page_table, keep, counts)


def key_redundancy(
    k_cache: torch.Tensor,
    page_table: torch.Tensor,
    seq_lens: torch.Tensor,
    *,
    threshold: float = 0.5,
    positions: torch.Tensor | None = None,
) -> torch.Tensor:
    """How much each cached key is like the others of its head: R-KV's redundancy (Cai et al., arXiv 2505.24133).

    Its mean cosine with the keys of the head, where each key leaves out its latest similar one: the newest of a group
    of similar keys does not look redundant. As in the authors' code (without its softmax), a cosine below the threshold
    counts too, and a key that has no similar one leaves out the earliest key. No matrix of all pairs is kept.

    Args:
        k_cache: as in `append_kv`. Scales do not matter to a cosine. page_table, seq_lens: see the module; here every
            page of a sequence must be mapped.
        threshold: -1 to 1; keys with a larger cosine are similar.
        positions: ``[batch, kv_heads, capacity]`` int32, last dimension contiguous: the position, at least 0, of the
            token in each slot, all different; says what is late. None: slots are in the order of positions.

    Returns:
        ``[batch, kv_heads, max_pages * page_size]`` float32; 0 past the end of a sequence.

    Equivalent PyTorch, for one head of n keys in the order of positions::

        unit = keys / (keys.norm(dim=-1, keepdim=True) + 1e-8)
        cosine = (unit @ unit.T).fill_diagonal_(0)
        for i in range(n):
            similar = (cosine[i] > threshold).nonzero()
            cosine[i, similar[-1] if len(similar) else 0] = 0
        redundancy = cosine.mean(0)
    """
    return _lil.key_redundancy(k_cache, page_table, seq_lens, threshold=threshold, positions=positions)


def decode_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    norm: torch.Tensor | None = None,
    eps: float = 1e-6,
    gated: bool = False,
    residual: torch.Tensor | None = None,
    cos: torch.Tensor | None = None,
    sin: torch.Tensor | None = None,
    rotated: int = 0,
) -> torch.Tensor:
    """A linear layer of a decode step: few rows, so that reading the weight is all there is to do.

    The RMS norm before it, the rotary embedding of queries and keys, the gate of a gated MLP and the residual addition
    behind it may come with it: a decode layer is then this operator four times, and attention.

    Args: (all contiguous, of one dtype: fp32, fp16 or bf16; on CUDA bf16, or fp16 without ``norm``)
        x: ``[..., in_features]``, at most 8 rows. weight: ``[out_features, in_features]``, both multiples of 16.
        bias: ``[out_features]``; not with ``gated``.
        norm: ``[in_features]``, weight of an RMS norm of x; None: x as it is. eps: of the norm, at least 0.
        gated: the weight is ``[2 * out_features, in_features]``, and its first half's outputs, through SiLU, are
            factors on the second half's.
        residual: ``[..., out_features]``, added at the end.
        cos, sin: ``[..., head_dim]``, head_dim a multiple of 32, of the rotary embedding at each row's position; both
            or neither, not with ``gated``. rotated: the first outputs, whole heads, that are rotated, first half
            against second half (as in Llama; not interleaved).

    Returns:
        ``[..., out_features]`` in x's dtype, rounded once; on CUDA with ``norm`` also ``x * norm`` is rounded.

    On CUDA (compute capability 9.0 and later; elsewhere an error) weight and norm are read before the kernels ahead on
    the stream have ended: neither may be what one of them writes.

    Equivalent PyTorch::

        if norm is not None:
            x = norm * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps)
        y = torch.nn.functional.linear(x, weight, bias)
        if gated:
            gate, up = y.chunk(2, -1)
            y = torch.nn.functional.silu(gate) * up
        if rotated:
            heads = y[..., :rotated].unflatten(-1, (-1, cos.shape[-1]))
            first, second = heads.chunk(2, -1)
            turned = torch.cat((-second, first), -1)
            y = torch.cat(((heads * cos[..., None, :] + turned * sin[..., None, :]).flatten(-2), y[..., rotated:]), -1)
        return y if residual is None else y + residual
    """
    return _lil.decode_linear(
        x, weight, bias, norm=norm, eps=eps, gated=gated, residual=residual, cos=cos, sin=sin, rotated=rotated
    )


def lz77_state(batch: int, capacity: int, device: torch.device | str = "cpu") -> torch.Tensor:
    """An empty parse for each of ``batch`` sequences of up to ``capacity`` tokens (1 to 16777216), for `lz77_append`.

    An int32 tensor of 64 bytes a token of capacity, ``[batch, state_size]``, all zeros; ``state[b].zero_()`` empties a
    row again. Raises ValueError for a capacity out of range.
    """
    from lil_ops import _C

    return torch.zeros(batch, _C.lz77_state_size(capacity), dtype=torch.int32, device=device)


def lz77_append(
    state: torch.Tensor, tokens: torch.Tensor, counts: torch.Tensor | None, vocab_size: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Feed new tokens to each sequence's LZ77 parse; the size of all its tokens so far, in phrases and in bits.

    The parse is greedy: a phrase (distance, length, next token) is the longest match that starts earlier, at any
    distance and free to overlap the phrase itself, and the token after it. The size over the number of tokens estimates
    the entropy rate; its growth over an interval is the information gain (Hu et al., arXiv 2601.03043). On the CPU a
    token costs amortised constant time, however the tokens are split over calls; on CUDA time grows with the length of
    the sequence, from very little.

    Args:
        state: from `lz77_state`; written.
        tokens: ``[batch, max_tokens]`` int32 or int64, last dimension contiguous, each from 0 to ``vocab_size - 1``.
        counts: ``[batch]`` int32, how many of each row's tokens count; None: all. What lies beyond is not read.
        vocab_size: 1 to 2147483647; sets the price of a token in bits.

    Returns:
        phrases ``[batch]`` int32: complete phrases, and one for a phrase not complete yet.
        bits ``[batch]`` int32: the same phrases, one that covers tokens i to i + k - 1 at
        ``ceil(log2(i + 1)) + 2 * floor(log2(k)) + 1 + ceil(log2(vocab_size))`` bits.

    Also RuntimeError, and no sequence changed: a token or count out of range, a sequence longer than its capacity, a
    state that is not one. On CUDA such a row is left as it was and returns its present size, the other rows are done,
    and `check_errors` raises.

    Equivalent Python, for the ``history`` of one sequence::

        phrases, start = 0, 0
        for end in range(1, len(history) + 1):
            phrase = history[start:end]
            if not any(history[p : p + len(phrase)] == phrase for p in range(start)):
                phrases, start = phrases + 1, end
        return phrases + (start < len(history))
    """
    return _lil.lz77_append(state, tokens, counts, vocab_size)


def guardian_check(
    sizes: torch.Tensor,
    num_tokens: torch.Tensor,
    interval: torch.Tensor,
    threshold: torch.Tensor,
    checkpoint: torch.Tensor,
    gain: torch.Tensor,
    stop: torch.Tensor,
) -> None:
    """Guardian's rule (Hu et al., arXiv 2601.03043): end sequences whose last interval added too little information.

    Args: (all contiguous, int32 but ``threshold``, on one device)
        sizes: ``[batch]`` LZ77 size of what each sequence generated, in any unit. num_tokens: ``[batch]`` its tokens.
        interval: ``[batch]`` tokens between checks; below 1: no check. threshold: ``[batch]`` float32, in sizes' unit.
        checkpoint: ``[batch, 2]`` tokens and size at the last check, zeros at the start; written.
        gain: ``[batch]`` growth of the size found by the last check; written.
        stop: ``[batch]`` `lil_ops.StopReason` codes; a sequence with a code but RUNNING is left alone; written.

    Equivalent Python, for each sequence b::

        tokens, size = checkpoint[b]
        if stop[b] == RUNNING and interval[b] >= 1 and num_tokens[b] - tokens >= interval[b]:
            gain[b] = sizes[b] - size
            checkpoint[b] = num_tokens[b], sizes[b]
            if gain[b] < threshold[b]:
                stop[b] = GUARDIAN

    Under torch.compile do not use, after this call, what was computed from ``stop`` before it: Inductor may compute it
    late, from the new values.
    """
    _lil.guardian_check(sizes, num_tokens, interval, threshold, checkpoint, gain, stop)

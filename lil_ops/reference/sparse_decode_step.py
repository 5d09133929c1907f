"""Definition of sparse_decode_step."""

from __future__ import annotations

from lil_ops.reference.append_kv import append_kv
from lil_ops.reference.information_loss import information_loss
from lil_ops.reference.score_pages import score_pages
from lil_ops.reference.select_pages import select_pages
from lil_ops.reference.sparse_decode import sparse_decode


def sparse_decode_step(
    q,
    k,
    v,
    k_cache,
    v_cache,
    summary,
    page_table,
    seq_lens,
    budget,
    *,
    sink=0,
    recent=1,
    protected_lens=None,
    scale=None,
    softcap=0.0,
    summary_mode="minmax",
    k_scale=None,
    v_scale=None,
):
    """See `lil_ops.sparse_decode_step`. Pure: returns (out, lse, k_cache, v_cache, summary, loss), those that are no
    buffers float64."""
    page_size = k_cache.size(2)
    scales = {"k_scale": k_scale, "v_scale": v_scale}
    k_cache, v_cache, summary = append_kv(
        k_cache, v_cache, summary, k, v, page_table, seq_lens, summary_mode=summary_mode, **scales
    )
    scores = score_pages(
        q, summary, page_table, seq_lens, page_size, scale=scale, summary_mode=summary_mode, k_scale=k_scale
    )
    options = {"sink": sink, "recent": recent, "protected_lens": protected_lens}
    pages, counts = select_pages(scores, seq_lens, page_size, budget, **options)
    out, lse = sparse_decode(
        q, k_cache, v_cache, page_table, seq_lens, pages, counts, scale=scale, softcap=softcap, **scales
    )
    loss = information_loss(lse, scores, seq_lens, page_size, pages, counts, softcap=softcap)
    return out, lse, k_cache, v_cache, summary, loss

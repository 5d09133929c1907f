"""Definition of represent_page."""

from __future__ import annotations

from lil_ops.reference._pages import physical_page
from lil_ops.reference.append_kv import stored


def represent_page(
    summary, weight, k_cache, page_table, seq_lens, mass, pages, counts=None, *, recent, representatives
):
    """See `lil_ops.represent_page`. Pure: returns (summary, weight), the weight float64."""
    summary, weight = summary.clone(), weight.double()
    kv_heads, page_size = k_cache.shape[1:3]
    group = mass.size(1) // max(1, kv_heads)
    for b, length in enumerate(seq_lens.tolist()):
        for h in range(kv_heads):
            heads = slice(h * group, (h + 1) * group)
            for entry in range(pages.size(2) if counts is None else int(counts[b, h])):
                start = int(pages[b, h, entry]) * page_size
                for t in range(page_size):
                    if start >= 0 and length - recent <= start + t < length:
                        weight[b, h, start + t] += mass[b, heads, entry * page_size + t].double().sum()
            outside = length + 1 - recent  # tokens that the next query's window leaves out
            if outside <= 0 or outside % page_size:
                continue
            page = outside // page_size - 1
            physical = physical_page(page_table, b, h, page)
            if physical >= 0:
                weights = weight[b, h, page * page_size : outside]
                heaviest = weights.argsort(descending=True, stable=True)[:representatives]
                mean = k_cache[physical, h].double()[heaviest].mean(0)
                summary[physical, h, 0] = stored(mean, 1.0, summary.dtype).to(summary.dtype)
    return summary, weight

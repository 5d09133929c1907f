"""Looking up pages and their scales, shared by the definitions."""

from __future__ import annotations

import torch


def physical_page(page_table: torch.Tensor, b: int, h: int, page: int) -> int:
    return int(page_table[b, h, page] if page_table.dim() == 3 else page_table[b, page])


def num_pages(length: int, page_size: int) -> int:
    return -(-length // page_size)


def page_scale(scale: torch.Tensor | None, physical: int, h: int) -> torch.Tensor | float:
    """What the stored values of a page are multiplied by: one factor a KV head, or a (page, KV head)."""
    if scale is None:
        return 1.0
    return scale[physical, h] if scale.dim() == 2 else scale[h]

"""Looking up pages, shared by the definitions."""

from __future__ import annotations

import torch


def physical_page(page_table: torch.Tensor, b: int, h: int, page: int) -> int:
    return int(page_table[b, h, page] if page_table.dim() == 3 else page_table[b, page])


def num_pages(length: int, page_size: int) -> int:
    return -(-length // page_size)

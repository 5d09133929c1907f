"""The paged KV cache: buffers, page table, free list, and the batch of sequences that one forward pass serves."""

from __future__ import annotations

import ctypes
import mmap
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from lil_ops import ops


class OutOfPagesError(RuntimeError):
    """The pool has fewer free pages than a step needs. Nothing was written."""


def huge_pages(tensor: torch.Tensor) -> torch.Tensor:
    """Ask the operating system for huge memory pages under a contiguous CPU tensor that was not written yet.

    A KV cache is read in no order: on small memory pages nearly every one of its pages misses the TLB. Only advice, for
    Linux; elsewhere, and on other devices, nothing happens. Returns the tensor.
    """
    if tensor.device.type == "cpu" and hasattr(mmap, "MADV_HUGEPAGE"):
        huge = 1 << 21
        first = -(-tensor.data_ptr() // huge) * huge
        size = (tensor.data_ptr() + tensor.numel() * tensor.element_size() - first) // huge * huge
        if size > 0:
            ctypes.CDLL(None).madvise(ctypes.c_void_p(first), ctypes.c_size_t(size), mmap.MADV_HUGEPAGE)
    return tensor


@dataclass
class Step:
    """What one forward pass works on; every operator of every layer reads these tensors.

    rows: the cache rows served, in order (host side).
    page_table: ``[len(rows), max_pages]`` int32. seq_lens: ``[len(rows)]`` int32, this step's tokens included.
    prompt_lens: ``[len(rows)]`` int32. cu_seqlens: ``[len(rows) + 1]`` int32 offsets of each row's new tokens, or None
    when every row adds exactly one.
    """

    rows: list[int]
    page_table: torch.Tensor
    seq_lens: torch.Tensor
    prompt_lens: torch.Tensor
    cu_seqlens: torch.Tensor | None


class PagedKVCache:
    """KV cache of ``batch`` sequences ("rows") in pages of ``page_size`` tokens, one page table for all layers.

    Args:
        num_layers, kv_heads, head_dim: the model's shape.
        batch: rows. max_tokens: tokens that one row may hold (fixes the page table's width).
        num_pages: size of the pool; default: every row full.
        summary: keep page summaries (``[num_pages, kv_heads, 2, head_dim]``, elementwise min and max of the keys).

    Buffers, one a layer: ``k``, ``v`` ``[num_pages, kv_heads, page_size, head_dim]`` and ``summary`` (or None). They
    are allocated once; on the CPU the operating system commits their memory as pages are first written.
    """

    def __init__(
        self,
        *,
        num_layers: int,
        kv_heads: int,
        head_dim: int,
        batch: int,
        max_tokens: int,
        page_size: int = 16,
        num_pages: int | None = None,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        summary_mode: str | None = None,
    ):
        if batch < 1 or max_tokens < 1:
            raise ValueError(f"PagedKVCache: batch and max_tokens: expected at least 1, got {batch} and {max_tokens}")
        if page_size not in (8, 16, 32, 64, 128):
            raise ValueError(f"PagedKVCache: page_size: expected a power of two from 8 to 128, got {page_size}")
        if summary_mode not in (None, "minmax", "meanstd"):
            raise ValueError(f"PagedKVCache: summary_mode: expected None, 'minmax' or 'meanstd', got {summary_mode!r}")
        self.page_size, self.batch, self.max_tokens = page_size, batch, max_tokens
        self.summary_mode = summary_mode
        self.max_pages = -(-max_tokens // page_size)
        self.num_pages = batch * self.max_pages if num_pages is None else num_pages
        self.kv_heads, self.head_dim, self.dtype, self.device = kv_heads, head_dim, dtype, torch.device(device)
        shape = (self.num_pages, kv_heads, page_size, head_dim)

        def buffers(*shape: int) -> list[torch.Tensor]:
            return [huge_pages(torch.empty(shape, dtype=dtype, device=device)) for _ in range(num_layers)]

        self.k, self.v = buffers(*shape), buffers(*shape)
        self.summary = buffers(self.num_pages, kv_heads, 2, head_dim) if summary_mode else [None] * num_layers
        vectors = page_size + page_size + (2 if summary_mode else 0)
        self.page_bytes = num_layers * kv_heads * vectors * head_dim * self.k[0].element_size() if num_layers else 0

        self.page_table = torch.full((batch, self.max_pages), -1, dtype=torch.int32, device=device)
        self.prompt_lens = torch.zeros(batch, dtype=torch.int32, device=device)
        self.lengths = [0] * batch  # host side: tokens of each row
        self.step: Step | None = None
        self._pages: list[list[int]] = [[] for _ in range(batch)]
        self._free = list(range(self.num_pages - 1, -1, -1))
        self._pages_peak = 0
        self._rows_table: tuple[tuple[int, ...], torch.Tensor] | None = None

    @property
    def bytes_in_use(self) -> int:
        """Bytes of the pages that hold some row's tokens, over all layers: K, V and summaries."""
        return (self.num_pages - len(self._free)) * self.page_bytes

    @property
    def bytes_peak(self) -> int:
        """The most that `bytes_in_use` has been."""
        return self._pages_peak * self.page_bytes

    def begin_step(self, rows: Sequence[int], new_tokens: Sequence[int], *, prompt: bool = False) -> Step:
        """Prepare one forward pass in which row ``rows[i]`` adds ``new_tokens[i]`` tokens; maps the pages it needs.

        Raises `OutOfPagesError` naming the shortfall, or ValueError for a row beyond its capacity, a row given twice or
        a negative number of tokens; the cache is then unchanged. With ``prompt=True`` the new tokens belong to the
        rows' prompts (which policies may protect).
        """
        if len(set(rows)) < len(rows):
            raise ValueError(f"PagedKVCache: rows: expected each row once, got {list(rows)}")
        needed = []
        for row, count in zip(rows, new_tokens, strict=True):
            if count < 0:
                raise ValueError(f"PagedKVCache: row {row}: expected at least 0 new tokens, got {count}")
            length = self.lengths[row] + count
            if length > self.max_tokens:
                raise ValueError(f"PagedKVCache: row {row}: expected at most {self.max_tokens} tokens, got {length}")
            needed.append(-(-length // self.page_size) - len(self._pages[row]))
        if sum(needed) > len(self._free):
            raise OutOfPagesError(
                f"PagedKVCache: this step needs {sum(needed)} more pages of {self.page_size} tokens, "
                f"{len(self._free)} of {self.num_pages} are free: {sum(needed) - len(self._free)} short"
            )
        for row, count, pages in zip(rows, new_tokens, needed, strict=True):
            self.lengths[row] += count
            if pages > 0:
                self._map(row, pages)
        if prompt:
            lengths = torch.tensor([self.lengths[row] for row in rows], dtype=torch.int32)
            self.prompt_lens[list(rows)] = lengths.to(self.device)
        self._pages_peak = max(self._pages_peak, self.num_pages - len(self._free))
        self.step = self._make_step(list(rows), list(new_tokens))
        return self.step

    def free(self, row: int) -> None:
        """Return all pages of a row to the pool; the row is empty and can serve a new sequence."""
        self._free.extend(reversed(self._pages[row]))
        self._pages[row] = []
        self.page_table[row] = -1
        self.lengths[row] = 0
        self._rows_table = None

    def append(self, layer: int, k: torch.Tensor, v: torch.Tensor) -> None:
        """Write this step's keys and values ``[tokens, kv_heads, head_dim]``, in its rows' order, into a layer."""
        step = self.step
        ops.append_kv(
            self.k[layer],
            self.v[layer],
            self.summary[layer],
            k,
            v,
            step.page_table,
            step.seq_lens,
            step.cu_seqlens,
            summary_mode=self.summary_mode or "minmax",
        )

    def gather(self, layer: int, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        """K and V of the step's ``index``-th row as dense ``[kv_heads, tokens, head_dim]`` tensors (copies)."""
        row = self.step.rows[index]
        pages = torch.tensor(self._pages[row], dtype=torch.long, device=self.device)

        def dense(cache: torch.Tensor) -> torch.Tensor:
            return cache[pages].transpose(0, 1).flatten(1, 2)[:, : self.lengths[row]]

        return dense(self.k[layer]), dense(self.v[layer])

    def _map(self, row: int, count: int) -> None:
        pages = [self._free.pop() for _ in range(count)]
        first = len(self._pages[row])
        self.page_table[row, first : first + count] = torch.tensor(pages, dtype=torch.int32, device=self.device)
        self._pages[row].extend(pages)
        self._rows_table = None

    def _make_step(self, rows: list[int], new_tokens: list[int]) -> Step:
        def ints(values: list[int]) -> torch.Tensor:
            return torch.tensor(values, dtype=torch.int32, device=self.device)

        # A subset of rows needs a gathered table: made again only when the rows or some row's pages change.
        key = tuple(rows)
        if self._rows_table is None or self._rows_table[0] != key:
            everything = rows == list(range(self.batch))
            self._rows_table = key, self.page_table if everything else self.page_table[rows]
        cu_seqlens = None
        if any(count != 1 for count in new_tokens):
            offsets = [0]
            for count in new_tokens:
                offsets.append(offsets[-1] + count)
            cu_seqlens = ints(offsets)
        prompt_lens = self.prompt_lens[rows]
        return Step(rows, self._rows_table[1], ints([self.lengths[row] for row in rows]), prompt_lens, cu_seqlens)

"""The paged KV cache: buffers, page tables, free lists, and the batch of sequences that one forward pass serves."""

from __future__ import annotations

import ctypes
import itertools
import mmap
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch

from lil_ops import ops
from lil_ops.checks import is_whole


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


class Room(NamedTuple):
    """How many tokens a layer holds of each sequence.

    total: at most so many; None: all. Where they are there, a new token takes the place of another, or of all but
    ``kept``. kept: at most so many of a prompt; None: all.
    """

    total: int | None = None
    kept: int | None = None

    def after(self, held: int, new: int, prompt: bool) -> int:
        """Tokens held once ``new`` ones have come to ``held``."""
        if prompt:
            return held + new if self.kept is None else min(held + new, self.kept)
        if held == self.total and new:
            held = min(held - 1, held if self.kept is None else self.kept)
        return held + new


ALL = Room()


@dataclass
class Step:
    """What one forward pass works on, in layers of one `Room`; every operator reads these tensors.

    rows: the cache rows served, in order; held: the tokens that each held before the step (host side).
    page_table: ``[len(rows), max_pages]`` int32. seq_lens: ``[len(rows)]`` int32, tokens held, this step's included.
    positions: ``[len(rows)]`` int32, tokens so far, forgotten ones included: where everything is held, ``seq_lens``.
    prompt_lens: ``[len(rows)]`` int32. cu_seqlens: ``[len(rows) + 1]`` int32 offsets of each row's new tokens, or None
    when every row adds exactly one.
    """

    rows: list[int]
    held: list[int]
    page_table: torch.Tensor
    seq_lens: torch.Tensor
    positions: torch.Tensor
    prompt_lens: torch.Tensor
    cu_seqlens: torch.Tensor | None
    _made: dict[Hashable, Any] = field(default_factory=dict, repr=False)

    def once(self, key: Hashable, make: Callable[[], Any]) -> Any:
        """What ``make`` returns the first time: for what a policy derives from these tensors, the same in all layers.

        A CUDA graph has to be captured from a step of which nothing was made yet, or its replays do not make it.
        """
        if key not in self._made:
            self._made[key] = make()
        return self._made[key]

    def forget(self) -> None:
        """The tensors are to hold the next step: make everything again."""
        self._made.clear()

    def take(self, state: torch.Tensor) -> torch.Tensor:
        """The step's rows of a tensor that has one entry a cache row: the tensor itself where the step serves all."""
        index = self._index(state)
        return state if index is None else state[index]

    def put(self, state: torch.Tensor, part: torch.Tensor) -> None:
        """Put back what was taken and changed."""
        if part is not state:
            state[self._index(state)] = part

    def _index(self, state: torch.Tensor) -> torch.Tensor | None:
        """The rows on the device, made once: a list would be sent there anew in every layer. None: all, in order."""

        def make() -> torch.Tensor | None:
            everything = self.rows == list(range(len(state)))
            return None if everything else torch.tensor(self.rows, device=state.device)

        return self.once("rows", make)


class Pool:
    """The pages of layers that have the same `Room`: they hold as many tokens of a row, in the same pages."""

    def __init__(self, room: Room, batch: int, max_tokens: int, page_size: int, num_pages: int | None, device):
        self.room, self.page_size, self.device = room, page_size, device
        self.max_pages = -(-min(max_tokens, room.total or max_tokens) // page_size)
        self.num_pages = batch * self.max_pages if num_pages is None else num_pages
        self.page_table = torch.full((batch, self.max_pages), -1, dtype=torch.int32, device=device)
        self.held = [0] * batch  # host side: tokens of each row
        self.pages: list[list[int]] = [[] for _ in range(batch)]
        self.free = list(range(self.num_pages - 1, -1, -1))
        self.page_bytes = 0
        self._rows_table: tuple[tuple[int, ...], torch.Tensor] | None = None

    def needed(self, row: int, held: int) -> int:
        """Pages to map before the row can hold so many tokens."""
        return max(0, -(-held // self.page_size) - len(self.pages[row]))

    def check_free(self, count: int) -> None:
        """Raise `OutOfPagesError` unless so many pages are free."""
        if count > len(self.free):
            raise OutOfPagesError(
                f"PagedKVCache: this step needs {count} more pages of {self.page_size} tokens, "
                f"{len(self.free)} of {self.num_pages} are free: {count - len(self.free)} short"
            )

    def map(self, row: int, count: int) -> None:
        if count == 0:
            return
        pages = [self.free.pop() for _ in range(count)]
        first = len(self.pages[row])
        self.page_table[row, first : first + count] = torch.tensor(pages, dtype=torch.int32, device=self.device)
        self.pages[row].extend(pages)
        self._rows_table = None

    def release(self, row: int) -> None:
        self.free.extend(reversed(self.pages[row]))
        self.pages[row] = []
        self.page_table[row] = -1
        self.held[row] = 0
        self._rows_table = None

    def table_of(self, rows: list[int]) -> torch.Tensor:
        """A subset of rows needs a gathered table: made again only when the rows or some row's pages change."""
        key = tuple(rows)
        if self._rows_table is None or self._rows_table[0] != key:
            everything = rows == list(range(len(self.page_table)))
            self._rows_table = key, self.page_table if everything else self.page_table[rows]
        return self._rows_table[1]


class PagedKVCache:
    """KV cache of ``batch`` sequences ("rows") in pages of ``page_size`` tokens.

    Layers of the same `Room` share a page table and a pool of pages; by default all hold every token, so that there is
    one.

    Args:
        num_layers, kv_heads, head_dim: the model's shape.
        batch: rows. max_tokens: tokens that one row may come to.
        num_pages: size of each pool; default: every row full.
        summary_mode: keep page summaries (see `lil_ops.append_kv`): ``"minmax"``, ``"meanstd"``; or
            ``"representative"``, which a policy fills. vectors: vectors in a summary, for ``"representative"``.
        summary_dtype: of the summaries: ``dtype``, which is the default, or ``torch.float8_e4m3fn``.
        rooms: one `Room` a layer.

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
        vectors: int = 2,
        summary_dtype: torch.dtype | None = None,
        rooms: Sequence[Room] | None = None,
    ):
        if batch < 1 or max_tokens < 1:
            raise ValueError(f"PagedKVCache: batch and max_tokens: expected at least 1, got {batch} and {max_tokens}")
        if not is_whole(page_size) or page_size not in (8, 16, 32, 64, 128):
            raise ValueError(f"PagedKVCache: page_size: expected a power of two from 8 to 128, got {page_size!r}")
        if num_pages is not None and not is_whole(num_pages, 0):
            raise ValueError(f"PagedKVCache: num_pages: expected a whole number of at least 0, got {num_pages!r}")
        if summary_mode not in (None, "minmax", "meanstd", "representative"):
            raise ValueError(
                f"PagedKVCache: summary_mode: expected None, 'minmax', 'meanstd' or 'representative', "
                f"got {summary_mode!r}"
            )
        summary_dtype = dtype if summary_dtype is None else summary_dtype
        if summary_dtype not in (dtype, torch.float8_e4m3fn):
            raise ValueError(
                f"PagedKVCache: summary_dtype: expected {dtype} or torch.float8_e4m3fn, got {summary_dtype}"
            )
        rooms = [ALL] * num_layers if rooms is None else list(rooms)
        if len(rooms) != num_layers:
            raise ValueError(f"PagedKVCache: rooms: expected one for each of {num_layers} layers, got {len(rooms)}")
        self.page_size, self.batch, self.max_tokens = page_size, batch, max_tokens
        self.summary_mode, self.rooms = summary_mode, rooms
        self.kv_heads, self.head_dim, self.dtype, self.device = kv_heads, head_dim, dtype, torch.device(device)
        self._pools = {room: Pool(room, batch, max_tokens, page_size, num_pages, device) for room in rooms or [ALL]}

        def buffers(rows: int, dtype: torch.dtype) -> list[torch.Tensor]:
            pools = [self._pools[room] for room in rooms]
            for pool in pools:
                pool.page_bytes += kv_heads * rows * head_dim * dtype.itemsize
            shapes = [(pool.num_pages, kv_heads, rows, head_dim) for pool in pools]
            return [huge_pages(torch.empty(shape, dtype=dtype, device=device)) for shape in shapes]

        self.k, self.v = (buffers(page_size, dtype) for _ in range(2))
        self.summary = buffers(vectors, summary_dtype) if summary_mode else [None] * num_layers

        self.prompt_lens = torch.zeros(batch, dtype=torch.int32, device=device)
        self.lengths = [0] * batch  # host side: tokens of each row, forgotten ones included
        self._steps: dict[Room, Step] = {}
        self.bytes_peak = 0  # the most that `bytes_in_use` has been

    @property
    def bytes_in_use(self) -> int:
        """Bytes of the pages that hold some row's tokens, over all layers: K, V and summaries."""
        return sum((pool.num_pages - len(pool.free)) * pool.page_bytes for pool in self._pools.values())

    def bytes_of(self, row: int) -> int:
        """Of `bytes_in_use`, those of one row."""
        return sum(len(pool.pages[row]) * pool.page_bytes for pool in self._pools.values())

    def pool_of(self, layer: int) -> Pool:
        """The pages of this layer."""
        return self._pools[self.rooms[layer]]

    def step_of(self, layer: int) -> Step:
        """The present step, as this layer sees it."""
        return self._steps[self.rooms[layer]]

    def begin_step(self, rows: Sequence[int], new_tokens: Sequence[int], *, prompt: bool = False) -> None:
        """Prepare one forward pass in which row ``rows[i]`` adds ``new_tokens[i]`` tokens; maps the pages it needs.

        Raises `OutOfPagesError` naming the shortfall, or ValueError for a row beyond its capacity, a row given twice or
        a negative number of tokens; the cache is then unchanged. With ``prompt=True`` the new tokens belong to the
        rows' prompts (which policies may protect).
        """
        if len(set(rows)) < len(rows):
            raise ValueError(f"PagedKVCache: rows: expected each row once, got {list(rows)}")
        for row, count in zip(rows, new_tokens, strict=True):
            if count < 0:
                raise ValueError(f"PagedKVCache: row {row}: expected at least 0 new tokens, got {count}")
            length = self.lengths[row] + count
            if length > self.max_tokens:
                raise ValueError(f"PagedKVCache: row {row}: expected at most {self.max_tokens} tokens, got {length}")
        plans = {room: self._plan(pool, rows, new_tokens, prompt) for room, pool in self._pools.items()}
        for row, count in zip(rows, new_tokens, strict=True):
            self.lengths[row] += count
        positions = self._ints([self.lengths[row] for row in rows])
        if prompt:
            self.prompt_lens[list(rows)] = positions
        for room, (held, needed) in plans.items():
            self._steps[room] = self._open(self._pools[room], list(rows), held, needed, new_tokens, positions)
        self.bytes_peak = max(self.bytes_peak, self.bytes_in_use)

    def reserve(self, row: int, prompt: int, new: int) -> None:
        """Map the pages of a whole sequence ahead: ``prompt`` tokens and then ``new`` ones.

        Raises `OutOfPagesError` naming the shortfall, as `begin_step` does; the cache is then unchanged.
        """
        plans = {}
        for pool in self._pools.values():
            held = pool.room.after(0, prompt, prompt=True) + new
            needed = pool.needed(row, held if pool.room.total is None else min(held, pool.room.total))
            pool.check_free(needed)
            plans[pool] = needed
        for pool, needed in plans.items():
            pool.map(row, needed)
        self.bytes_peak = max(self.bytes_peak, self.bytes_in_use)

    def install(self, steps: dict[Room, Step]) -> None:
        """Let the layers see these steps, which somebody else makes and advances (`DeviceSteps`)."""
        self._steps.update(steps)

    def free(self, row: int) -> None:
        """Return all pages of a row to the pools; the row is empty and can serve a new sequence."""
        for pool in self._pools.values():
            pool.release(row)
        self.lengths[row] = 0

    def append(
        self,
        layer: int,
        k: torch.Tensor,
        v: torch.Tensor,
        *,
        slots: torch.Tensor | None = None,
        page_table: torch.Tensor | None = None,
        seq_lens: torch.Tensor | None = None,
        cu_seqlens: torch.Tensor | None = None,
    ) -> None:
        """Write this step's keys and values ``[tokens, kv_heads, head_dim]``, in its rows' order, into a layer.

        slots: as in `lil_ops.append_kv`. page_table, seq_lens, cu_seqlens: in place of the step's.
        """
        step = self.step_of(layer)
        summed = self.summary_mode in ("minmax", "meanstd")
        ops.append_kv(
            self.k[layer],
            self.v[layer],
            self.summary[layer] if summed else None,
            k,
            v,
            step.page_table if page_table is None else page_table,
            step.seq_lens if seq_lens is None else seq_lens,
            step.cu_seqlens if cu_seqlens is None else cu_seqlens,
            summary_mode=self.summary_mode if summed else "minmax",
            slots=slots,
        )

    def gather(self, layer: int, index: int, tokens: int | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """K and V of the step's ``index``-th row as dense ``[kv_heads, tokens, head_dim]`` tensors (copies).

        tokens: the first so many slots; default: all that are held.
        """
        pool = self.pool_of(layer)
        row = self.step_of(layer).rows[index]
        tokens = pool.held[row] if tokens is None else tokens
        pages = torch.tensor(pool.pages[row], dtype=torch.long, device=self.device)

        def dense(cache: torch.Tensor) -> torch.Tensor:
            return cache[pages].transpose(0, 1).flatten(1, 2)[:, :tokens]

        return dense(self.k[layer]), dense(self.v[layer])

    def _ints(self, values: Sequence[int]) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.int32, device=self.device)

    def _plan(
        self, pool: Pool, rows: Sequence[int], new_tokens: Sequence[int], prompt: bool
    ) -> tuple[list[int], list[int]]:
        """Tokens that each row will hold, and pages to map for them; raises where the pool has too few."""
        held = [pool.room.after(pool.held[row], n, prompt) for row, n in zip(rows, new_tokens, strict=True)]
        needed = [pool.needed(row, tokens) for row, tokens in zip(rows, held, strict=True)]
        pool.check_free(sum(needed))
        return held, needed

    def _open(
        self,
        pool: Pool,
        rows: list[int],
        held: list[int],
        needed: list[int],
        new_tokens: Sequence[int],
        positions: torch.Tensor,
    ) -> Step:
        before = [pool.held[row] for row in rows]
        for row, tokens, pages in zip(rows, held, needed, strict=True):
            pool.map(row, pages)
            pool.held[row] = tokens
        cu_seqlens = None
        if any(count != 1 for count in new_tokens):
            cu_seqlens = self._ints([0, *itertools.accumulate(new_tokens)])
        seq_lens = positions if pool.room == ALL else self._ints(held)
        return Step(rows, before, pool.table_of(rows), seq_lens, positions, self.prompt_lens[rows], cu_seqlens)

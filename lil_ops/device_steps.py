"""The steps of a cache as buffers on the device, which a captured CUDA graph reads and advances by itself."""

from __future__ import annotations

import torch

from lil_ops.cache import ALL, PagedKVCache, Room, Step


class DeviceSteps:
    """`Step`s of one token a row that serve all rows for ever: `advance` makes the next one in place.

    Whoever uses them maps the pages of a whole sequence ahead (`PagedKVCache.reserve`), tells each row's lengths once
    its prompt is in the cache (`load`), and puts them in place after each prompt (`install`). A row that does not run
    has length 0, in which no operator reads or writes anything; its real one is kept.

    positions: ``[batch]`` int32, the tokens so far of rows that run in this step, else 0.
    """

    def __init__(self, cache: PagedKVCache):
        self._cache = cache
        self._lens = self._zeros()
        self.positions = self._zeros()
        self._held: dict[Room, torch.Tensor] = {}
        self._steps: dict[Room, Step] = {}
        for room in dict.fromkeys(cache.rooms):
            pool = cache.pool_of(cache.rooms.index(room))
            seq_lens = self.positions if room == ALL else self._zeros()
            if room != ALL:
                self._held[room] = self._zeros()
            rows = list(range(cache.batch))
            self._steps[room] = Step(
                rows, [], pool.page_table, seq_lens, self.positions, cache.prompt_lens, cu_seqlens=None
            )

    def install(self) -> None:
        """The cache's layers see these steps from now on."""
        self._cache.install(self._steps)

    def load(self, row: int) -> None:
        """Take over from the host what a row holds."""
        self._lens[row] = self._cache.lengths[row]
        for room, held in self._held.items():
            held[row] = self._cache.pool_of(self._cache.rooms.index(room)).held[row]

    def advance(self, running: torch.Tensor) -> None:
        """One token more in each row of ``running`` ``[batch]`` bool; tensor operations only."""
        self._lens += running
        self.positions.copy_(self._lens * running)
        for room, step in self._steps.items():
            if room == ALL:
                continue
            held = self._held[room]
            if room.total is not None:
                # `Room.after`: where a row is full, all go but `kept`, and one at least.
                left = room.total - 1 if room.kept is None else min(room.total - 1, room.kept)
                held.masked_fill_(running & (held == room.total), left)
            held += running
            step.seq_lens.copy_(held * running)

    def forget(self) -> None:
        """What was made of the steps' tensors is to be made anew."""
        for step in self._steps.values():
            step.forget()

    def _zeros(self) -> torch.Tensor:
        return torch.zeros(self._cache.batch, dtype=torch.int32, device=self._cache.device)

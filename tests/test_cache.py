"""PagedKVCache: which page holds what, what comes back, what it costs, and what is refused."""

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from lil_ops.cache import OutOfPagesError, PagedKVCache, Room

LAYERS, HEADS, DIM, PAGE = 2, 2, 64, 8


def make(batch=3, max_tokens=40, **options):
    return PagedKVCache(
        num_layers=LAYERS, kv_heads=HEADS, head_dim=DIM, batch=batch, max_tokens=max_tokens, page_size=PAGE, **options
    )


def table(cache, layer=0):
    """The page table of all rows."""
    return cache.pool_of(layer).page_table


def begin(cache, *arguments, **options):
    """Begin a step; it, as the first layer sees it."""
    cache.begin_step(*arguments, **options)
    return cache.step_of(0)


def mapped(cache, row, layer=0):
    """The pages of a row, read from the table that the operators read."""
    entries = table(cache, layer)[row].tolist()
    used = len([entry for entry in entries if entry >= 0])
    assert entries[used:] == [-1] * (cache.pool_of(layer).max_pages - used)
    assert used == -(-cache.pool_of(layer).held[row] // cache.page_size)
    return entries[:used]


def state(cache):
    return table(cache).tolist(), cache.prompt_lens.tolist(), list(cache.lengths), cache.bytes_in_use


def append(cache, rows, counts, seed=0):
    """One pass with random keys and values; returns those of each layer, ``[tokens, heads, dim]``."""
    cache.begin_step(rows, counts)
    g = torch.Generator().manual_seed(seed)
    written = [torch.randn(2, sum(counts), HEADS, DIM, generator=g).unbind() for _ in range(LAYERS)]
    for layer, (k, v) in enumerate(written):
        cache.append(layer, k, v)
    return written


def test_a_step_describes_its_rows():
    cache = make()
    step = begin(cache, [0, 1, 2], [9, 1, 16], prompt=True)
    assert step.rows == [0, 1, 2] and step.page_table is table(cache)
    assert step.seq_lens.tolist() == step.prompt_lens.tolist() == [9, 1, 16]
    assert step.cu_seqlens.tolist() == [0, 9, 10, 26]
    assert all(t.dtype == torch.int32 for t in (step.page_table, step.seq_lens, step.prompt_lens, step.cu_seqlens))
    assert [len(mapped(cache, row)) for row in range(3)] == [2, 1, 2]
    step = begin(cache, [0, 1, 2], [1, 1, 1])
    assert step.cu_seqlens is None and step is cache.step_of(0)
    assert step.seq_lens.tolist() == [10, 2, 17] and step.prompt_lens.tolist() == [9, 1, 16]
    # Only the third row left its last page.
    assert [len(mapped(cache, row)) for row in range(3)] == [2, 1, 3]


def test_rows_in_any_order_and_number():
    cache = make()
    cache.begin_step([0, 1, 2], [10, 3, 20], prompt=True)
    step = begin(cache, [2, 0], [5, 7])
    assert step.seq_lens.tolist() == [25, 17] and step.prompt_lens.tolist() == [20, 10]
    assert step.cu_seqlens.tolist() == [0, 5, 12]
    assert torch.equal(step.page_table, table(cache)[[2, 0]])
    # The gathered table follows the pages that later steps map.
    for _ in range(8):
        step = begin(cache, [2, 0], [1, 1])
        assert torch.equal(step.page_table, table(cache)[[2, 0]])
    assert cache.lengths == [25, 3, 33]


@pytest.mark.parametrize("rows", [[0, 1, 2], [2, 0]])
def test_gather_returns_what_was_appended(rows):
    cache = make()
    first = append(cache, rows, [3] * len(rows), seed=1)
    second = append(cache, rows, [9] * len(rows), seed=2)
    for layer in range(LAYERS):
        for index in range(len(rows)):
            for which, found in enumerate(cache.gather(layer, index)):
                parts = [first[layer][which].split(3)[index], second[layer][which].split(9)[index]]
                assert torch.equal(found, torch.cat(parts).transpose(0, 1))


def test_summaries_are_kept_where_asked_for():
    cache = make(summary_mode="minmax")
    written = append(cache, [0], [5])
    for (k, _), summary in zip(written, cache.summary, strict=True):
        assert torch.equal(summary[mapped(cache, 0)[0]], torch.stack([k.amin(0), k.amax(0)], 1))
    assert make().summary == [None] * LAYERS


def test_float8_summaries_beside_a_wider_cache():
    cache = make(summary_mode="minmax", dtype=torch.bfloat16, summary_dtype=torch.float8_e4m3fn)
    cache.begin_step([0], [5])
    k = torch.randn(5, HEADS, DIM).bfloat16()
    cache.append(0, k, k)
    summary = cache.summary[0][mapped(cache, 0)[0]]
    assert cache.k[0].dtype == torch.bfloat16 and summary.dtype == torch.float8_e4m3fn
    low, high = summary.float().unbind(1)
    assert (low <= k.amin(0)).all() and (high >= k.amax(0)).all()
    assert (low - k.amin(0)).abs().max() < 0.5


def test_unknown_summaries():
    with pytest.raises(
        ValueError, match="summary_mode: expected None, 'minmax', 'meanstd' or 'representative', got 'max'"
    ):
        make(summary_mode="max")


def test_a_summary_dtype_that_append_kv_does_not_take():
    with pytest.raises(
        ValueError, match=r"summary_dtype: expected torch\.float32 or torch\.float8_e4m3fn, got torch\.b"
    ):
        make(summary_mode="minmax", summary_dtype=torch.bfloat16)


@pytest.mark.parametrize("summary_mode", [None, "minmax", "meanstd"])
@pytest.mark.parametrize("summary_dtype", [None, torch.float8_e4m3fn])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bytes_are_those_of_the_mapped_pages(summary_mode, summary_dtype, dtype):
    cache = make(summary_mode=summary_mode, dtype=dtype, summary_dtype=summary_dtype)
    buffers = cache.k + cache.v + (cache.summary if summary_mode else [])
    page = sum(buffer[0].nbytes for buffer in buffers)
    assert cache.bytes_in_use == cache.bytes_peak == 0
    cache.begin_step([0, 1], [17, 8])
    assert cache.bytes_in_use == cache.bytes_peak == 4 * page
    cache.free(0)
    cache.begin_step([1], [1])
    assert cache.bytes_in_use == 2 * page and cache.bytes_peak == 4 * page


def test_freed_pages_serve_other_rows():
    cache = make(num_pages=4)
    cache.begin_step([0, 1], [24, 8], prompt=True)
    pages = mapped(cache, 0)
    cache.free(0)
    assert cache.lengths[0] == 0 and mapped(cache, 0) == []
    cache.begin_step([2], [24])
    assert sorted(mapped(cache, 2)) == sorted(pages)
    # A row that is used again starts without the tokens and the prompt of its last sequence.
    cache.free(2)
    assert begin(cache, [0], [2], prompt=True).prompt_lens.tolist() == [2]


def test_a_table_of_some_rows_forgets_freed_pages():
    cache = make()
    cache.begin_step([1, 2], [8, 7])
    cache.free(1)
    step = begin(cache, [1, 2], [0, 1])
    assert step.page_table[0].tolist() == [-1] * cache.pool_of(0).max_pages
    assert torch.equal(step.page_table, table(cache)[[1, 2]])


@pytest.mark.parametrize(
    ("error", "rows", "counts", "message"),
    [
        (OutOfPagesError, [0, 1, 2], [8, 7, 9], r"needs 3 more pages of 8 tokens, 2 of 5 are free: 1 short"),
        (OutOfPagesError, [2], [40], r"needs 5 more pages of 8 tokens, 2 of 5 are free: 3 short"),
        (ValueError, [1, 0], [1, 33], r"row 0: expected at most 40 tokens, got 41"),
        (ValueError, [0], [1, 1], "zip"),
        (ValueError, [2, 0, 2], [1, 1, 1], r"rows: expected each row once, got \[2, 0, 2\]"),
        (ValueError, [2, 0], [1, -1], "row 0: expected at least 0 new tokens, got -1"),
    ],
)
def test_a_step_that_does_not_fit_changes_nothing(error, rows, counts, message):
    cache = make(num_pages=5)
    step = begin(cache, [0, 1], [8, 9], prompt=True)
    before, peak = state(cache), cache.bytes_peak
    with pytest.raises(error, match=message):
        cache.begin_step(rows, counts, prompt=True)
    assert state(cache) == before and cache.bytes_peak == peak and cache.step_of(0) is step
    # What is free still serves.
    cache.begin_step([2], [16])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch": 0}, "batch and max_tokens: expected at least 1, got 0 and 40"),
        ({"max_tokens": 0}, "batch and max_tokens: expected at least 1, got 3 and 0"),
        ({"num_pages": -1}, "num_pages: expected a whole number of at least 0, got -1"),
        ({"num_pages": 4.0}, "num_pages: expected a whole number of at least 0, got 4.0"),
    ],
)
def test_bad_sizes(options, message):
    with pytest.raises(ValueError, match=message):
        make(**options)


@pytest.mark.parametrize("page_size", [0, 4, 12, 256, 16.0, "16"])
def test_bad_page_size(page_size):
    with pytest.raises(ValueError, match=f"page_size: expected a power of two from 8 to 128, got {page_size!r}"):
        PagedKVCache(num_layers=1, kv_heads=1, head_dim=64, batch=1, max_tokens=8, page_size=page_size)


def test_a_room_bounds_what_a_row_maps():
    """5 layers' bytes: two hold everything, two 20 tokens, one 12 of a prompt and then everything."""
    rooms = [Room(), Room(), Room(20, 20), Room(20, 20), Room(kept=12)]
    cache = PagedKVCache(
        num_layers=5, kv_heads=HEADS, head_dim=DIM, batch=1, max_tokens=200, page_size=PAGE, rooms=rooms
    )
    cache.begin_step([0], [30], prompt=True)
    assert [cache.step_of(layer).seq_lens.item() for layer in range(5)] == [30, 30, 20, 20, 12]
    assert cache.step_of(2).positions.item() == cache.step_of(2).prompt_lens.item() == 30
    for n in range(31, 201):
        cache.begin_step([0], [1])
        held = [n, n, 20, 20, n - 18]
        assert [cache.step_of(layer).seq_lens.item() for layer in range(5)] == held
        assert [len(mapped(cache, 0, layer)) for layer in range(5)] == [-(-tokens // PAGE) for tokens in held]
    page = cache.k[0][0].nbytes + cache.v[0][0].nbytes
    assert cache.bytes_in_use == page * (25 + 25 + 3 + 3 + 23) and cache.k[2].shape[0] == 3
    cache.free(0)
    assert cache.bytes_in_use == 0
    # Where the room is full, all but `kept` make place.
    assert [Room(24, 16).after(held, 1, False) for held in (15, 23, 24)] == [16, 24, 17]
    assert Room(24, 16).after(10, 30, True) == 16 and Room(24, 24).after(24, 0, False) == 24


def test_out_of_pages_in_one_of_several_pools_changes_none():
    """The pools have as many pages each: that of the layers that hold everything is the first to be short."""
    rooms = [Room(20, 20), Room(), Room(kept=12)]
    cache = PagedKVCache(
        num_layers=3, kv_heads=HEADS, head_dim=DIM, batch=2, max_tokens=200, page_size=PAGE, num_pages=6, rooms=rooms
    )

    def everything():
        pools = [cache.pool_of(layer) for layer in range(3)]
        return [(pool.page_table.tolist(), list(pool.held), sorted(pool.free)) for pool in pools], list(cache.lengths)

    cache.begin_step([0], [30], prompt=True)
    before, steps = everything(), [cache.step_of(layer) for layer in range(3)]
    with pytest.raises(OutOfPagesError, match="needs 3 more pages of 8 tokens, 2 of 6 are free: 1 short"):
        cache.begin_step([1], [20], prompt=True)
    assert everything() == before and [cache.step_of(layer) for layer in range(3)] == steps
    cache.begin_step([1], [16], prompt=True)
    # The bounded pool has room left, the others do not; a step needs all.
    with pytest.raises(OutOfPagesError, match="needs 1 more pages of 8 tokens, 0 of 6 are free: 1 short"):
        cache.begin_step([1], [1])
    for row in range(2):
        cache.free(row)
    assert cache.bytes_in_use == 0 and all(len(cache.pool_of(layer).free) == 6 for layer in range(3))


class Traffic(RuleBasedStateMachine):
    """Any sequence of steps and frees on a pool that is too small for all rows."""

    BATCH, PAGES = 4, 7

    def __init__(self):
        super().__init__()
        self.cache, self.lengths = make(batch=self.BATCH, num_pages=self.PAGES), [0] * self.BATCH

    @rule(data=st.data())
    def step(self, data):
        rows = data.draw(st.lists(st.integers(0, self.BATCH - 1), min_size=1, unique=True))
        counts = data.draw(st.lists(st.integers(0, 20), min_size=len(rows), max_size=len(rows)))
        lengths = list(self.lengths)
        for row, count in zip(rows, counts, strict=True):
            lengths[row] += count
        fits = sum(-(-length // PAGE) for length in lengths) <= self.PAGES and max(lengths) <= self.cache.max_tokens
        try:
            step = begin(self.cache, rows, counts)
        except (OutOfPagesError, ValueError):
            assert not fits
        else:
            assert fits
            self.lengths = lengths
            assert torch.equal(step.page_table, table(self.cache)[rows])
            assert step.seq_lens.tolist() == [lengths[row] for row in rows]

    @rule(row=st.integers(0, BATCH - 1))
    def free(self, row):
        self.cache.free(row)
        self.lengths[row] = 0

    @invariant()
    def every_page_has_one_owner(self):
        assert self.cache.lengths == self.lengths
        pages = [page for row in range(self.BATCH) for page in mapped(self.cache, row)]
        assert len(set(pages)) == len(pages) and set(pages) <= set(range(self.PAGES))
        assert self.cache.bytes_in_use == len(pages) * self.cache.pool_of(0).page_bytes

    def teardown(self):
        for row in range(self.BATCH):
            self.cache.free(row)
        assert self.cache.bytes_in_use == 0
        # All pages are there to be used again.
        self.cache.begin_step([0, 1], [5 * PAGE, 2 * PAGE])
        assert sorted(mapped(self.cache, 0) + mapped(self.cache, 1)) == list(range(self.PAGES))


TestTraffic = Traffic.TestCase
TestTraffic.settings = settings(max_examples=60, deadline=None)

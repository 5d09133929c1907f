import pytest
import torch
from cases import (
    DTYPES,
    FLOAT8,
    HEAD_DIMS,
    OPCHECKS_OF_FLOAT8,
    PAGE_SIZES,
    TOLERANCE,
    assert_same,
    paged,
    relative_error,
    without_nan,
)
from hypothesis import given, settings
from hypothesis import strategies as st

import lil_ops
from lil_ops import reference

OPERATOR = "represent_page"


def case(cache, group=2, *, entries=None, counts=True, seed=0):
    """``(summary, weight, k_cache, page_table, seq_lens, mass, pages, counts)``: each list has random pages of the
    sequence, each once. Weights are multiples of 1/64: sums are exact, and many are equal."""
    g = torch.Generator().manual_seed(seed)
    page_size, heads, lengths = cache.k.size(2), cache.k.size(1), cache.seq_lens.tolist()
    max_pages = cache.page_table.size(-1)
    entries = max_pages if entries is None else entries
    pages = torch.full((len(lengths), heads, entries), -1, dtype=torch.int32)
    used = torch.zeros(len(lengths), heads, dtype=torch.int32)
    for b, n in enumerate(lengths):
        for h in range(heads):
            order = torch.randperm(-(-n // page_size), generator=g)[:entries]
            pages[b, h, : len(order)] = order.int()
            used[b, h] = len(order)
    if counts:  # what lies behind is not looked at
        pages[torch.arange(entries) >= used[..., None]] = 12345
    mass = torch.randint(0, 9, (len(lengths), heads * group, entries * page_size), generator=g) / 64
    weight = torch.randint(0, 33, (len(lengths), heads, max_pages * page_size), generator=g) / 64
    to = cache.k.device
    read = mass.to(to), pages.to(to), used.to(to) if counts else None
    return cache.summary, weight.to(to), cache.k, cache.page_table, cache.seq_lens, *read


def representative(device, lengths, *, dtype=torch.float32, summary_dtype=None, **options):
    return paged(device, lengths, dtype=dtype, summary_mode="representative", representatives=1,
                 summary_dtype=summary_dtype, **options)  # fmt: skip


def check(arguments, recent, representatives):
    """Against the reference. Returns which (page, KV head) were represented."""
    summary, weight = arguments[:2]
    before = summary.clone()
    options = {"recent": recent, "representatives": representatives}
    want_summary, want_weight = reference.represent_page(*arguments, **options)
    lil_ops.represent_page(*arguments, **options)
    assert torch.equal(weight.double(), want_weight)
    same = (want_summary.float() == before.float()) | want_summary.isnan() & before.isnan()
    written = ~same.flatten(2).all(-1)
    assert_same(summary[~written], before[~written])
    if summary.dtype == FLOAT8:  # to the next value
        assert (order_of(summary) - order_of(want_summary))[written].abs().le(1).all()
    else:
        assert relative_error(summary[written], want_summary[written]) < TOLERANCE[summary.dtype]
    return written


def order_of(x):
    """Which of the values of float8 it is, counted from 0: both zeros are one."""
    bits = x.view(torch.uint8).int()
    return torch.where(bits < 128, bits, 128 - bits)


def leaves(n, recent, page_size):
    return n + 1 > recent and (n + 1 - recent) % page_size == 0


@settings(max_examples=150, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 150), max_size=3),
    heads=st.integers(1, 3),
    group=st.integers(1, 9),
    entries=st.sampled_from([None, 0, 1, 3]),
    counts=st.booleans(),
    recent=st.integers(1, 60),
    representatives=st.integers(1, 8),
    per_head=st.booleans(),
    nhd=st.booleans(),
    dtype=st.sampled_from([*DTYPES, FLOAT8]),
    summary_dtype=st.sampled_from([None, FLOAT8]),
    aligned=st.booleans(),
    seed=st.integers(0, 999),
)
def test_matches_reference(
    device, lengths, heads, group, entries, counts, recent, representatives, per_head, nhd, dtype, summary_dtype,
    aligned, seed
):  # fmt: skip
    if aligned:  # a page leaves wherever one can
        lengths = [n + (recent - n - 1) % 8 if n else 0 for n in lengths]
    cache = representative(device, lengths, kv_heads=heads, page_size=8, dtype=dtype, summary_dtype=summary_dtype,
                           per_head=per_head, nhd=nhd, seed=seed)  # fmt: skip
    check(case(cache, group, entries=entries, counts=counts, seed=seed), recent, representatives)


@pytest.mark.parametrize("summary_dtype", [None, FLOAT8])
@pytest.mark.parametrize("dtype", [*DTYPES, FLOAT8])
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_head_dims(device, head_dim, dtype, summary_dtype):
    lengths = [63, 50, 31, 0]
    cache = representative(device, lengths, head_dim=head_dim, dtype=dtype, summary_dtype=summary_dtype)
    written = check(case(cache, 4), 16, 4)
    pages = [cache.page_table[b, (n + 1) // 16 - 2] for b, n in enumerate(lengths) if leaves(n, 16, 16)]
    assert len(pages) == 2 and written.nonzero().tolist() == sorted([int(p), h] for p in pages for h in range(2))


@pytest.mark.parametrize("page_size", PAGE_SIZES)
@pytest.mark.parametrize("representatives", [1, 3, 8])
def test_page_sizes(device, page_size, representatives):
    cache = representative(device, [4 * page_size - 1, 2 * page_size + 5], page_size=page_size)
    assert check(case(cache), page_size, representatives).sum() == 2


def test_long_lists(device):
    cache = representative(device, [4095, 3000], dtype=torch.bfloat16)
    check(case(cache, 4), 2048, 4)


def test_step_by_step(device):
    """A sequence that grows: every page is represented once, when the window has left it, and by what it got there."""
    size, recent, last, heads, group = 8, 20, 90, 2, 3
    cache = representative(device, [last], page_size=size, kv_heads=heads)
    g = torch.Generator().manual_seed(3)
    max_pages = cache.page_table.size(1)
    weight, total = (torch.zeros(1, heads, max_pages * size, device=device) for _ in range(2))
    pages = torch.arange(max_pages, dtype=torch.int32, device=device).repeat(1, heads, 1)
    done, fresh = 0, cache.summary.clone()
    for n in range(1, last + 1):
        cache.seq_lens.fill_(n)
        pages_now = pages.where(pages * size < n, -1)
        mass = torch.randint(0, 1 << 12, (1, heads * group, max_pages * size), generator=g).to(device) / (1 << 12)
        read = cache.k, cache.page_table, cache.seq_lens, mass, pages_now
        lil_ops.represent_page(cache.summary, weight, *read, recent=recent, representatives=3)
        inside = slice(max(0, n - recent), n)
        total[..., inside] += mass.unflatten(1, (heads, group)).sum(2)[..., inside]
        assert torch.equal(weight, total)
        while (done + 1) * size <= n + 1 - recent:
            physical = cache.page_table[0, done]
            best = total[0, :, done * size : (done + 1) * size].argsort(dim=-1, descending=True, stable=True)[:, :3]
            want = cache.k[physical].gather(1, best[..., None].expand(-1, -1, 64)).mean(1)
            torch.testing.assert_close(cache.summary[physical, :, 0], want)
            fresh[physical] = cache.summary[physical]
            done += 1
        assert_same(cache.summary, fresh)
    assert done == (last + 1 - recent) // size


def test_of_equals_the_earlier_and_nan_first(device):
    cache = representative(device, [15], page_size=8, kv_heads=1)
    summary, weight, *others, mass, pages, counts = case(cache, 1)
    mass.zero_()
    for weights, want in (
        ([1, 2, 2, 0, 2, 1, 0, 0], [1, 2]),
        ([0, 0, 0, 0, 0, 0, 0, 0], [0, 1]),
        ([3, 0, 0, torch.nan, 0, 4, 0, 0], [3, 5]),
        ([0, 0, torch.nan, torch.inf, torch.nan, 4, torch.nan, 0], [2, 4]),
    ):
        weight[0, 0, :8] = torch.tensor(weights, device=device)
        options = {"recent": 8, "representatives": 2}
        lil_ops.represent_page(summary, weight, *others, mass, pages, counts, **options)
        page = cache.page_table[0, 0]
        torch.testing.assert_close(summary[page, 0, 0], cache.k[page, 0, want].mean(0))


def test_a_page_that_is_not_mapped_is_not_represented(device):
    cache = representative(device, [31, 31], page_size=8)
    arguments = case(cache)
    cache.page_table[0, 1] = -1  # leaves the window of 16
    assert check(arguments, 16, 2).any(1).nonzero().flatten().tolist() == [int(cache.page_table[1, 1])]


def test_nan_stays_in_its_head_and_sequence(device):
    cache = representative(device, [31, 31], page_size=8)
    summary, weight, *others, mass, pages, counts = case(cache)
    clean = summary.clone(), weight.clone()
    mass[0, 0] = torch.nan
    options = {"recent": 16, "representatives": 2}
    lil_ops.represent_page(summary, weight, *others, mass, pages, counts, **options)
    mass[0, 0] = 0
    lil_ops.represent_page(*clean, *others, mass, pages, counts, **options)
    assert weight[0, 0].isnan().any() and assert_same(weight[:, 1], clean[1][:, 1]) is None
    assert_same(weight[1], clean[1][1])
    assert_same(summary[:, 1], clean[0][:, 1])


def test_empty(device):
    for lengths, heads in (([], 2), ([0, 0], 2), ([5], 1)):
        cache = representative(device, lengths, kv_heads=heads)
        assert not check(case(cache, entries=0), 4, 2).any()


def test_float8_keys_are_stored_values(device):
    cache = representative(device, [31], page_size=8, dtype=FLOAT8, scales="page")
    check(case(cache), 16, 4)


NAMES = ["summary", "weight", "k_cache", "page_table", "seq_lens", "mass", "pages", "counts"]
BAD = {
    "summary: expected one vector, the mean, got 2": lambda a: a.update(summary=a["summary"].repeat(1, 1, 2, 1)),
    "summary: expected shape": lambda a: a.update(summary=a["summary"][:2]),
    "summary: expected Float or Float8_e4m3fn, got Half": lambda a: a.update(summary=a["summary"].half()),
    "weight: expected shape \\[batch, kv_heads, max_pages \\* page_size\\]": lambda a: a.update(
        weight=a["weight"][..., 1:]
    ),
    "weight: expected Float, got Double": lambda a: a.update(weight=a["weight"].double()),
    "weight: expected a contiguous": lambda a: a.update(weight=a["weight"].mT.contiguous().mT),
    "k_cache: expected": lambda a: a.update(k_cache=a["k_cache"][..., :32]),
    "page_table: expected shape": lambda a: a.update(page_table=a["page_table"][:1]),
    "seq_lens: expected Int, got Long": lambda a: a.update(seq_lens=a["seq_lens"].long()),
    "mass: expected shape \\[batch, q_heads, capacity \\* page_size\\]": lambda a: a.update(mass=a["mass"][..., 1:]),
    "mass: expected query heads that are a multiple of 2, got 3": lambda a: a.update(
        mass=a["mass"][:, :3].contiguous()
    ),
    "mass: expected Float, got Half": lambda a: a.update(mass=a["mass"].half()),
    "pages: expected shape": lambda a: a.update(pages=a["pages"][:, :1]),
    "pages: expected Int, got Long": lambda a: a.update(pages=a["pages"].long()),
    "counts: expected shape": lambda a: a.update(counts=a["counts"][:1]),
    "recent: expected at least 1, got 0": lambda a: a.update(recent=0),
    "representatives: expected 1 to 16, got 0": lambda a: a.update(representatives=0),
    "representatives: expected 1 to 16, got 17": lambda a: a.update(representatives=17),
}  # fmt: skip


@pytest.mark.parametrize("message", BAD)
def test_bad_input_writes_nothing(device, message):
    arguments = dict(zip(NAMES, case(representative(device, [47, 7])), strict=True), recent=16, representatives=4)
    written = {name: arguments[name] for name in ("summary", "weight")}
    before = {name: value.clone() for name, value in written.items()}
    BAD[message](arguments)
    with pytest.raises(RuntimeError, match=f"lil::represent_page: {message}"):
        lil_ops.represent_page(**arguments)
    for name, value in written.items():
        assert_same(value, before[name])


def test_no_more_representatives_than_a_page_has(device):
    arguments = case(representative(device, [31], page_size=8))
    with pytest.raises(RuntimeError, match="representatives: expected 1 to 8, got 9"):
        lil_ops.represent_page(*arguments, recent=16, representatives=9)


@pytest.mark.parametrize("what", ["seq_lens", "counts", "pages", "page_table"])
def test_values_out_of_range(device, what):
    arguments = dict(zip(NAMES, case(representative(device, [47, 47])), strict=True))
    before = {name: arguments[name].clone() for name in ("summary", "weight")}
    bad = {"seq_lens": 999, "counts": 99, "pages": 77, "page_table": 999}[what]
    arguments[what] = torch.full_like(arguments[what], bad)
    with pytest.raises(RuntimeError, match=f"{what}: expected"):
        lil_ops.represent_page(**arguments, recent=16, representatives=4)
        lil_ops.check_errors()
    # On CUDA what is wrong is skipped, and the rest is done.
    if device == "cpu" or what != "page_table":
        assert_same(arguments["weight"], before["weight"])
    if device == "cpu" or what in ("seq_lens", "page_table"):
        assert_same(arguments["summary"], before["summary"])


def test_opcheck(device):
    arguments = case(representative(device, [47, 7]))
    arguments = (arguments[0].nan_to_num(), arguments[1], arguments[2].nan_to_num(), *arguments[3:])
    options = {"recent": 16, "representatives": 4}
    torch.library.opcheck(torch.ops.lil.represent_page.default, arguments, options)
    torch.library.opcheck(torch.ops.lil.represent_page.default, case_without_counts(arguments), options)
    arguments = case(representative(device, [47, 7], dtype=FLOAT8))
    arguments = (without_nan(arguments[0]), arguments[1], without_nan(arguments[2]), *arguments[3:])
    torch.library.opcheck(torch.ops.lil.represent_page.default, arguments, options, test_utils=OPCHECKS_OF_FLOAT8)


def case_without_counts(arguments):
    pages = arguments[-2].where(arguments[-2] < 12345, -1)
    return *arguments[:-2], pages

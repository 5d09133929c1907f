import pytest
import torch
from cases import (
    DTYPES,
    FLOAT8,
    HEAD_DIMS,
    OPCHECKS_OF_FLOAT8,
    PAGE_SIZES,
    SCALES,
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

OPERATOR = "append_kv"


def new_tokens(count, cache, seed=3, dtype=None):
    g = torch.Generator().manual_seed(seed)
    shape = (count, cache.k.size(1), cache.k.size(3))
    return [torch.randn(shape, generator=g).to(cache.k.device, dtype or cache.k.dtype) for _ in range(2)]


def check(cache, k, v, cu_seqlens=None, summary=True, mode="minmax", slots=None):
    """The reference's bits; means and standard deviations, which are computed, within the tolerance."""
    before = [cache.k.clone(), cache.v.clone(), cache.summary.clone() if summary else None]
    options = {"summary_mode": mode, "slots": slots, **cache.scales}
    expected = reference.append_kv(*before, k, v, cache.page_table, cache.seq_lens, cu_seqlens, **options)
    target = cache.summary if summary else None
    lil_ops.append_kv(cache.k, cache.v, target, k, v, cache.page_table, cache.seq_lens, cu_seqlens, **options)
    for actual, want in zip([cache.k, cache.v], expected[:2], strict=True):
        assert_same(actual, want)
    if summary and mode == "minmax":
        assert_same(target, expected[2])
    elif summary:
        for i in range(2):
            check_computed(target[:, :, i], expected[2][:, :, i])


def check_computed(actual, expected):
    assert torch.equal(actual.float().isnan(), expected.float().isnan())
    actual, expected = (without_nan(t) for t in (actual, expected))
    if actual.dtype == FLOAT8:
        # Means of float8 values are often halfway between two of them; float32 may take the other one.
        places = [t.view(torch.int8).int() for t in (actual, expected)]
        steps = torch.sub(*(torch.where(place < 0, -128 - place, place) for place in places))
        assert steps.abs().max() <= 1 and (steps != 0).float().mean() < 0.02
    else:
        assert relative_error(actual, expected) < TOLERANCE[actual.dtype]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("page_size", PAGE_SIZES)
def test_one_token_a_sequence(device, dtype, page_size):
    cache = paged(device, [1, page_size, page_size + 1, 3 * page_size - 2], page_size=page_size, dtype=dtype)
    check(cache, *new_tokens(4, cache))


@settings(max_examples=40, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 70), min_size=1, max_size=4),
    page_size=st.sampled_from([8, 16, 32]),
    head_dim=st.sampled_from([64, 80, 96]),
    per_head=st.booleans(),
    nhd=st.booleans(),
    summary=st.booleans(),
    data=st.data(),
)
def test_ragged(device, lengths, page_size, head_dim, per_head, nhd, summary, data):
    cache = paged(device, lengths, kv_heads=3, head_dim=head_dim, page_size=page_size, per_head=per_head, nhd=nhd)
    added = [data.draw(st.integers(0, n)) for n in lengths]
    cu_seqlens = torch.tensor([0, *torch.tensor(added).cumsum(0).tolist()], dtype=torch.int32, device=device)
    check(cache, *new_tokens(sum(added), cache), cu_seqlens, summary)


@pytest.mark.parametrize("scales", SCALES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_float8(device, dtype, head_dim, scales):
    cache = paged(device, [1, 16, 17, 46], head_dim=head_dim, dtype=FLOAT8, scales=scales)
    check(cache, *new_tokens(4, cache, dtype=dtype))


@settings(max_examples=40, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 70), min_size=1, max_size=4),
    page_size=st.sampled_from([8, 16, 32]),
    head_dim=st.sampled_from([64, 80, 96]),
    dtype=st.sampled_from(DTYPES),
    scales=st.sampled_from(SCALES),
    mode=st.sampled_from(["minmax", "meanstd"]),
    per_head=st.booleans(),
    nhd=st.booleans(),
    summary=st.booleans(),
    data=st.data(),
)
def test_ragged_float8(device, lengths, page_size, head_dim, dtype, scales, mode, per_head, nhd, summary, data):
    cache = paged(device, lengths, kv_heads=3, head_dim=head_dim, page_size=page_size, per_head=per_head, nhd=nhd,
                  dtype=FLOAT8, scales=scales, summary_mode=mode)  # fmt: skip
    added = [data.draw(st.integers(0, n)) for n in lengths]
    cu_seqlens = torch.tensor([0, *torch.tensor(added).cumsum(0).tolist()], dtype=torch.int32, device=device)
    check(cache, *new_tokens(sum(added), cache, dtype=dtype), cu_seqlens, summary, mode)


FLOAT8_SUMMARY = {"summary_dtype": FLOAT8}


@pytest.mark.parametrize("mode", ["minmax", "meanstd"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_float8_summary(device, dtype, head_dim, mode):
    cache = paged(device, [1, 16, 17, 46], head_dim=head_dim, dtype=dtype, summary_mode=mode, **FLOAT8_SUMMARY)
    check(cache, *new_tokens(4, cache), mode=mode)


@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 70), min_size=1, max_size=4),
    page_size=st.sampled_from([8, 16, 32]),
    head_dim=st.sampled_from([64, 80, 96]),
    dtype=st.sampled_from(DTYPES),
    mode=st.sampled_from(["minmax", "meanstd"]),
    size=st.sampled_from([1e-3, 1.0, 150.0]),
    per_head=st.booleans(),
    nhd=st.booleans(),
    data=st.data(),
)
def test_ragged_float8_summary(device, lengths, page_size, head_dim, dtype, mode, size, per_head, nhd, data):
    cache = paged(device, lengths, kv_heads=3, head_dim=head_dim, page_size=page_size, per_head=per_head, nhd=nhd,
                  dtype=dtype, summary_mode=mode, **FLOAT8_SUMMARY)  # fmt: skip
    added = [data.draw(st.integers(0, n)) for n in lengths]
    cu_seqlens = torch.tensor([0, *torch.tensor(added).cumsum(0).tolist()], dtype=torch.int32, device=device)
    k, v = new_tokens(sum(added), cache)
    check(cache, k * size, v, cu_seqlens, mode=mode)


def bounds_of_pages(device, keys, dtype):
    """The float8 summary ``[2, pages, 64]`` of pages that hold ``keys [pages, tokens, 64]`` each."""
    pages, tokens, _ = keys.shape
    cache = paged(device, [tokens] * pages, kv_heads=1, dtype=dtype, page_size=8, **FLOAT8_SUMMARY)
    k = keys.to(device, dtype).flatten(0, 1)[:, None]
    cu_seqlens = torch.arange(0, len(k) + 1, tokens, dtype=torch.int32, device=device)
    lil_ops.append_kv(cache.k, cache.v, cache.summary, k, k, cache.page_table, cache.seq_lens, cu_seqlens)
    return cache.summary[cache.page_table[:, 0].long(), 0].transpose(0, 1)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_float8_bounds_of_every_value(device, dtype):
    """Of a page with one key the bounds are its neighbours: each of the 65536 values, and what float32 has between."""
    bits = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32).short()
    x = bits.view(torch.float16 if dtype == torch.float16 else torch.bfloat16)
    if dtype == torch.float32:
        values = torch.arange(127, dtype=torch.uint8).view(FLOAT8).float()
        ends = torch.tensor([torch.inf, -torch.inf])
        x = torch.cat([x.float(), *(torch.nextafter(sign * values, end) for end in ends for sign in (1, -1))])
        x = torch.nn.functional.pad(x, (0, -len(x) % 64))
    low, high = bounds_of_pages(device, x.view(-1, 1, 64), dtype)
    grid = torch.arange(127, dtype=torch.uint8).view(FLOAT8).double()
    grid = torch.cat([-grid.flip(0)[:-1], grid]).to(device)
    x = x.view(-1, 64).to(device).double()
    # The nearest values on either side, found by counting.
    below, above = torch.searchsorted(grid, x, right=True) - 1, torch.searchsorted(grid, x)
    for got, index, lost in ((low, below, x < -448), (high, above, x > 448)):
        got, lost = got.double(), lost | x.isnan()
        assert torch.equal(got.isnan(), lost)
        assert torch.equal(got[~lost], grid[index[~lost]])
    exact = x.abs() <= 448
    assert (low.double() <= x)[exact].all() and (high.double() >= x)[exact].all()


def test_float8_bounds_saturate_inside_alone(device):
    """A bound that float8 has stays one, also beyond its range; one that it has not is NaN."""
    keys = torch.zeros(1, 2, 64)
    keys[0, :, :6] = torch.tensor([[500.0, -500.0, 448.0, -448.0, 448.5, torch.inf], [600, -600, 1, -1, 3, 500]])
    low, high = bounds_of_pages(device, keys, torch.float32)
    nan = torch.nan
    expected = torch.tensor([[448, nan, 1, -448, 3, 448], [nan, -448, 448, -1, nan, nan]], device=device)
    got = torch.stack([low[0, :6], high[0, :6]]).float()
    torch.testing.assert_close(got, expected, rtol=0, atol=0, equal_nan=True)


def special_values(device):
    """Every float8 value, the middle between neighbours and what lies beside it, and what is out of range."""
    every = torch.arange(127, dtype=torch.uint8).view(FLOAT8).float()
    middles = (every[1:] + every[:-1]) / 2
    beside = [torch.nextafter(middles, torch.full_like(middles, end)) for end in (0, 1000)]
    large = torch.tensor([447.9, 448.0, 449.0, 463.9, 464.0, 464.1, 480.0, 1e4, 3e38, torch.inf, torch.nan, 1e-30])
    values = torch.cat([every, middles, *beside, large])
    values = torch.cat([values, -values])
    return torch.nn.functional.pad(values, (0, -len(values) % 128)).view(-1, 1, 128).expand(-1, 2, -1).to(device)


@pytest.mark.parametrize("scale", [None, 1.0, 0.3, 2.0**-9, 7.0])
def test_float8_bits(device, scale):
    """To the nearest, even among equals; saturating, infinities too (torch's own conversion may give NaN)."""
    k = special_values(device)
    cache = paged(device, [len(k)], head_dim=128, dtype=FLOAT8)
    scales = None if scale is None else torch.full((2,), scale, device=device)
    cu_seqlens = torch.tensor([0, len(k)], dtype=torch.int32, device=device)
    lil_ops.append_kv(
        cache.k, cache.v, cache.summary, k, -k, cache.page_table, cache.seq_lens, cu_seqlens, k_scale=scales
    )
    got_k, got_v = (t[cache.page_table[0, 0], 0, : len(k)] for t in (cache.k, cache.v))
    for got, x in (
        (got_k, k[:, 0] if scale is None else k[:, 0] / torch.tensor(scale, device=device)),
        (got_v, -k[:, 0]),
    ):
        want = x.clamp(-448, 448).to(FLOAT8)
        nan = x.isnan()
        assert got.float().isnan().equal(nan)
        assert got.view(torch.uint8)[~nan].equal(want.view(torch.uint8)[~nan])
        assert (got.float()[x.abs() >= 448].abs() == 448).all()


def test_a_scale_of_each_page_is_that_of_the_physical_page(device):
    cache = paged(device, [9, 24], page_size=8, dtype=FLOAT8, scales="page")
    cache.k_scale.fill_(torch.nan)
    last = [cache.page_table[0, 1].item(), cache.page_table[1, 2].item()]
    cache.k_scale[last] = torch.tensor([[1.0, 2.0], [4.0, 8.0]], device=device)
    k = torch.full((2, 2, 64), 16.0, device=device)
    lil_ops.append_kv(cache.k, cache.v, None, k, k, cache.page_table, cache.seq_lens, **cache.scales)
    stored = cache.k.float()[last, :, [0, 7], 0]
    assert stored.tolist() == [[16.0, 8.0], [4.0, 2.0]]


@pytest.mark.parametrize("dtype", [*DTYPES, FLOAT8])
@pytest.mark.parametrize("page_size", PAGE_SIZES)
def test_mean_and_deviation(device, dtype, page_size):
    cache = paged(device, [1, page_size, page_size + 1, 3 * page_size - 2], page_size=page_size, dtype=dtype)
    check(cache, *new_tokens(4, cache, dtype=torch.float32 if dtype == FLOAT8 else dtype), mode="meanstd")


@settings(max_examples=40, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 70), min_size=1, max_size=4),
    head_dim=st.sampled_from([64, 80, 192]),
    dtype=st.sampled_from(DTYPES),
    per_head=st.booleans(),
    data=st.data(),
)
def test_ragged_mean_and_deviation(device, lengths, head_dim, dtype, per_head, data):
    cache = paged(device, lengths, kv_heads=3, head_dim=head_dim, per_head=per_head, dtype=dtype)
    added = [data.draw(st.integers(0, n)) for n in lengths]
    cu_seqlens = torch.tensor([0, *torch.tensor(added).cumsum(0).tolist()], dtype=torch.int32, device=device)
    check(cache, *new_tokens(sum(added), cache), cu_seqlens, mode="meanstd")


@pytest.mark.parametrize("dtype", [*DTYPES, FLOAT8])
def test_equal_keys_deviate_by_nothing(device, dtype):
    """Rounding must not make the variance negative, nor leave a deviation where there is none."""
    tokens = 13
    cache = paged(device, [tokens], dtype=dtype)
    key = torch.randn(1, 2, 64, generator=torch.Generator().manual_seed(0)) * 30
    key = key.to(device, torch.float32 if dtype == FLOAT8 else dtype).expand(tokens, 2, 64)
    cu_seqlens = torch.tensor([0, tokens], dtype=torch.int32, device=device)
    arguments = cache.k, cache.v, cache.summary, key, key, cache.page_table, cache.seq_lens, cu_seqlens
    lil_ops.append_kv(*arguments, summary_mode="meanstd")
    page = cache.page_table[0, 0]
    mean, deviation, stored = cache.summary[page, :, 0], cache.summary[page, :, 1], cache.k[page, :, 0].float()
    assert relative_error(mean.float(), stored) < 1e-6
    assert (deviation.float() <= 1e-6 * stored.abs()).all() and (deviation.float() >= 0).all()


def test_a_small_deviation_beside_a_large_mean(device):
    cache = paged(device, [16])
    page = cache.page_table[0, 0]
    cache.k[page] = 1000 + 0.01 * torch.randn(2, 16, 64, generator=torch.Generator().manual_seed(0)).to(device)
    k = cache.k[page, :, 15][None].clone()
    lil_ops.append_kv(cache.k, cache.v, cache.summary, k, k, cache.page_table, cache.seq_lens, summary_mode="meanstd")
    keys = cache.k[page].double()
    assert relative_error(cache.summary[page, :, 0], keys.mean(1)) < 1e-6
    assert relative_error(cache.summary[page, :, 1], keys.std(1, correction=0)) < 1e-4


def test_strided_tokens(device):
    cache = paged(device, [20, 5])
    k, v = (
        torch.randn(2, 2, 64, device=device).transpose(0, 1) for _ in range(2)
    )  # as [kv_heads, tokens, head_dim] viewed
    check(cache, k, v)


@settings(max_examples=80, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 70), min_size=1, max_size=4),
    page_size=st.sampled_from([8, 16, 32]),
    head_dim=st.sampled_from([64, 80, 192]),
    dtype=st.sampled_from([*DTYPES, FLOAT8]),
    mode=st.sampled_from(["minmax", "meanstd"]),
    scales=st.sampled_from(SCALES),
    summary_dtype=st.sampled_from([None, FLOAT8]),
    per_head=st.booleans(),
    nhd=st.booleans(),
    summary=st.booleans(),
    data=st.data(),
)
def test_slots(device, lengths, page_size, head_dim, dtype, mode, scales, summary_dtype, per_head, nhd, summary, data):
    cache = paged(device, lengths, kv_heads=3, head_dim=head_dim, page_size=page_size, per_head=per_head, nhd=nhd,
                  dtype=dtype, scales=scales if dtype == FLOAT8 else None, summary_mode=mode,
                  summary_dtype=summary_dtype)  # fmt: skip
    slots = [data.draw(st.lists(st.integers(-1, n - 1), min_size=3, max_size=3)) for n in lengths]
    slots = torch.tensor(slots, dtype=torch.int32, device=device)
    k, v = new_tokens(len(lengths), cache, dtype=torch.bfloat16 if dtype == FLOAT8 else dtype)
    check(cache, k, v, None, summary, mode, slots)


def test_slots_of_minus_one_are_the_last_places(device):
    caches = [paged(device, [1, 16, 17, 46], dtype=torch.bfloat16) for _ in range(2)]
    for cache, slots in zip(caches, (None, torch.full((4, 2), -1, dtype=torch.int32, device=device)), strict=True):
        check(cache, *new_tokens(4, cache), slots=slots)
    for name in ("k", "v", "summary"):
        assert_same(*(getattr(cache, name) for cache in caches))


def test_a_bad_slot_stays_in_its_head(device):
    """The other heads are written on CUDA, and on the CPU nothing is."""
    cache, untouched = (paged(device, [20, 5]) for _ in range(2))
    k, v = new_tokens(2, cache)
    slots = torch.tensor([[3, 20], [-2, 0]], dtype=torch.int32, device=device)
    with pytest.raises(RuntimeError, match=r"lil::append_kv: slots: expected -1 or a slot from 0 to (19|4) for"):
        lil_ops.append_kv(cache.k, cache.v, cache.summary, k, v, cache.page_table, cache.seq_lens, slots=slots)
        lil_ops.check_errors()
    good = torch.tensor([[True, False], [False, True]], device=device)
    written = torch.zeros(len(cache.k), 2, dtype=torch.bool, device=device)
    written[cache.page_table[:, 0]] = good & (device != "cpu")
    for name in ("k", "v", "summary"):
        now, then = (getattr(c, name).nan_to_num() for c in (cache, untouched))
        assert torch.equal((now != then).flatten(2).any(-1), written)


@pytest.mark.parametrize("summary_dtype", [torch.float32, FLOAT8])
def test_overwriting_a_token_renews_the_summary(device, summary_dtype):
    cache = paged(device, [16], summary_dtype=summary_dtype)
    cache.k[cache.page_table[0, 0], :, 15] = 100.0
    lil_ops.append_kv(cache.k, cache.v, cache.summary, *new_tokens(1, cache), cache.page_table, cache.seq_lens)
    assert cache.summary[cache.page_table[0, 0]].float().max() < 100


@pytest.mark.parametrize("mode", ["minmax", "meanstd"])
@pytest.mark.parametrize(
    ("dtype", "summary_dtype"), [(torch.float32, torch.float32), (torch.bfloat16, FLOAT8), (FLOAT8, FLOAT8)]
)
def test_nan_key_stays_in_its_summary(device, dtype, summary_dtype, mode):
    cache = paged(device, [16, 16], dtype=dtype, summary_dtype=summary_dtype)
    k, v = new_tokens(2, cache, dtype=torch.float32 if dtype == FLOAT8 else dtype)
    k[0, 0, 5] = torch.nan
    lil_ops.append_kv(cache.k, cache.v, cache.summary, k, v, cache.page_table, cache.seq_lens, summary_mode=mode)
    first, second = cache.page_table[:, 0]
    nan = cache.summary.float().isnan()
    assert nan[first, 0, :, 5].all()
    assert nan[first].sum() == 2 and not nan[second].any()


def test_copy_on_write_copies_get_storage_of_their_own(device):
    cache = paged(device, [20, 5])
    buffers = cache.k, cache.v, cache.summary
    copies, before = [torch._lazy_clone(t) for t in buffers], [t.clone() for t in buffers]
    k, v = new_tokens(2, cache)
    expected = reference.append_kv(*before, k, v, cache.page_table, cache.seq_lens)
    lil_ops.append_kv(*copies, k, v, cache.page_table, cache.seq_lens)
    for actual, want in zip((*buffers, *copies), (*before, *expected), strict=True):
        torch.testing.assert_close(actual, want, rtol=0, atol=0, equal_nan=True)


def test_empty_batch(device):
    cache = paged(device, [])
    check(cache, *new_tokens(0, cache))


def test_opcheck(device):
    cache = paged(device, [20, 5])
    k, v = new_tokens(2, cache)
    for summary in (cache.summary.nan_to_num(), None):
        args = (cache.k.nan_to_num(), cache.v.nan_to_num(), summary, k, v, cache.page_table, cache.seq_lens)
        for slots in (None, torch.tensor([[3, -1], [0, 4]], dtype=torch.int32, device=device)):
            options = {"summary_mode": "meanstd", "slots": slots}
            torch.library.opcheck(torch.ops.lil.append_kv.default, args, options)


def test_opcheck_float8(device):
    cache = paged(device, [20, 5], dtype=FLOAT8, scales="page")
    buffers = (without_nan(t) for t in (cache.k, cache.v, cache.summary))
    args = (*buffers, *new_tokens(2, cache, dtype=torch.bfloat16), cache.page_table, cache.seq_lens)
    torch.library.opcheck(torch.ops.lil.append_kv.default, args, cache.scales, test_utils=OPCHECKS_OF_FLOAT8)
    cache = paged(device, [20, 5], dtype=torch.bfloat16, **FLOAT8_SUMMARY)
    buffers = (without_nan(t) for t in (cache.k, cache.v, cache.summary))
    args = (*buffers, *new_tokens(2, cache), cache.page_table, cache.seq_lens)
    torch.library.opcheck(torch.ops.lil.append_kv.default, args, test_utils=OPCHECKS_OF_FLOAT8)


@pytest.mark.parametrize("slots", [None, -1])
def test_a_sequence_of_no_tokens_takes_no_part(device, slots):
    cache = paged(device, [20, 0, 5])
    k, v = new_tokens(3, cache)
    buffers = [t.clone() for t in (cache.k, cache.v, cache.summary)]
    slots = None if slots is None else torch.full((3, cache.k.shape[1]), slots, dtype=torch.int32, device=device)
    lil_ops.append_kv(cache.k, cache.v, cache.summary, k, v, cache.page_table, cache.seq_lens, slots=slots)
    expected = reference.append_kv(*buffers, k, v, cache.page_table, cache.seq_lens, slots=slots)
    for actual, before, wanted in zip((cache.k, cache.v, cache.summary), buffers, expected, strict=True):
        torch.testing.assert_close(actual, wanted.to(actual.dtype), rtol=0, atol=0, equal_nan=True)
        assert not torch.equal(actual.nan_to_num(), before.nan_to_num())
    if device == "cuda":
        lil_ops.check_errors()


def slots_like(a):
    return a["seq_lens"].new_zeros(2, 2)


BAD = {
    "k_cache: expected shape": lambda a: a.update(k_cache=a["k_cache"][0]),
    "v_cache: expected shape": lambda a: a.update(v_cache=a["v_cache"][:, :1]),
    "k_cache: expected a page size": lambda a: a.update(
        k_cache=a["k_cache"][:, :, :12], v_cache=a["v_cache"][:, :, :12]
    ),
    "k_cache: expected a head_dim": lambda a: a.update(k_cache=a["k_cache"][..., :48], v_cache=a["v_cache"][..., :48]),
    "k_cache: expected dtype": lambda a: a.update(k_cache=a["k_cache"].double()),
    "v_cache: expected Float, got Half": lambda a: a.update(v_cache=a["v_cache"].half()),
    "v_cache: expected a contiguous last dimension": lambda a: a.update(
        v_cache=a["v_cache"].transpose(2, 3).contiguous().transpose(2, 3)
    ),
    "summary: expected shape": lambda a: a.update(summary=a["summary"][:, :, :1]),
    "summary: expected Float or Float8_e4m3fn, got Half": lambda a: a.update(summary=a["summary"].half()),
    "summary: expected its last two dimensions contiguous": lambda a: a.update(
        summary=a["summary"].to(FLOAT8).repeat(1, 1, 2, 1)[:, :, ::2]
    ),
    "k_scale: expected None where values are not stored as Float8_e4m3fn, got": lambda a: a.update(
        summary=a["summary"].to(FLOAT8), k_scale=torch.ones(2)
    ),
    "k: expected shape": lambda a: a.update(k=a["k"][:, :, :32]),
    "k: expected Float, got Half": lambda a: a.update(k=a["k"].half()),
    "v: expected shape": lambda a: a.update(v=a["v"][:1]),
    "page_table: expected Int": lambda a: a.update(page_table=a["page_table"].long()),
    "page_table: expected shape": lambda a: a.update(page_table=a["page_table"][:1]),
    "seq_lens: expected Int": lambda a: a.update(seq_lens=a["seq_lens"].long()),
    "seq_lens: expected 0 to": lambda a: a.update(seq_lens=a["seq_lens"].new_tensor([20, 1000])),
    "seq_lens: expected at least the 2 tokens": lambda a: a.update(
        seq_lens=a["seq_lens"].new_tensor([20, 1]), cu_seqlens=a["seq_lens"].new_tensor([0, 0, 2])
    ),
    "page_table: expected a page from 0": lambda a: a.update(page_table=a["page_table"] * 0 - 1),
    "page_table: expected a page from 0 to": lambda a: a.update(page_table=a["page_table"] * 0 + 1000),
    "cu_seqlens: expected ascending": lambda a: a.update(cu_seqlens=a["seq_lens"].new_tensor([0, 2, 1])),
    "slots: expected None beside cu_seqlens": lambda a: a.update(
        slots=slots_like(a), cu_seqlens=a["seq_lens"].new_tensor([0, 1, 2])
    ),
    "slots: expected shape": lambda a: a.update(slots=slots_like(a)[:1]),
    "slots: expected Int, got Long": lambda a: a.update(slots=slots_like(a).long()),
    "slots: expected a contiguous": lambda a: a.update(slots=slots_like(a).T),
    "slots: expected -1 or a slot from 0 to": lambda a: a.update(slots=slots_like(a) + 20),
    "slots: expected -1 or a slot from 0": lambda a: a.update(slots=slots_like(a) - 2),
    "summary_mode: expected 'minmax' or 'meanstd', got 'max'": lambda a: a.update(summary_mode="max"),
    "summary_mode: expected 'minmax' or 'meanstd' \\(which keys represent a page is for the policy": lambda a: a.update(
        summary_mode="representative"
    ),
    "k_scale: expected None where values are not stored as Float8": lambda a: a.update(k_scale=torch.ones(2)),
    "v_scale: expected None where values are not stored as Float8": lambda a: a.update(v_scale=torch.ones(2)),
}


SEEN_ON_THE_DEVICE = [m for m in BAD if "from 0" in m or "0 to" in m or "at least the" in m or "ascending" in m]


def check_refused(cache, k, v, message, change):
    args = dict(k_cache=cache.k, v_cache=cache.v, summary=cache.summary, k=k, v=v, page_table=cache.page_table,
                seq_lens=cache.seq_lens)  # fmt: skip
    change(args)
    before = [t.clone() for t in (cache.k, cache.v, cache.summary)]
    with pytest.raises(RuntimeError, match=f"lil::append_kv: {message}"):
        lil_ops.append_kv(**args)
        lil_ops.check_errors()
    if cache.k.is_cuda and message in SEEN_ON_THE_DEVICE:
        return
    for now, then in zip((cache.k, cache.v, cache.summary), before, strict=True):
        assert_same(now, then)


@pytest.mark.parametrize("message", BAD)
def test_bad_input_writes_nothing(device, message):
    """On CUDA what only the device sees is skipped, and told by check_errors; other sequences are written."""
    cache = paged(device, [20, 5])
    check_refused(cache, *new_tokens(2, cache), message, BAD[message])


BAD_FLOAT8 = {
    "k: expected dtype float32, float16 or bfloat16, got Float8": lambda a: a.update(k=a["k"].to(FLOAT8)),
    "v: expected Float, got Half": lambda a: a.update(v=a["v"].half()),
    "v_cache: expected Float8_e4m3fn, got Float": lambda a: a.update(v_cache=a["v_cache"].float()),
    "k_cache: expected dtype": lambda a: a.update(
        k_cache=a["k_cache"].view(torch.float8_e5m2), v_cache=a["v_cache"].view(torch.float8_e5m2)
    ),
    "summary: expected Float8_e4m3fn, got Float": lambda a: a.update(summary=a["summary"].float()),
    "k_scale: expected Float, got Half": lambda a: a.update(k_scale=torch.ones(2, device=a["k"].device).half()),
    "k_scale: expected shape": lambda a: a.update(k_scale=torch.ones(3, device=a["k"].device)),
    "v_scale: expected shape": lambda a: a.update(v_scale=torch.ones(2, 2, device=a["k"].device)),
    "v_scale: expected a contiguous": lambda a: a.update(
        v_scale=torch.ones(2, len(a["v_cache"]), device=a["k"].device).T
    ),
    "summary_mode: expected 'minmax' or 'meanstd', got ''": lambda a: a.update(summary_mode=""),
}


@pytest.mark.parametrize("message", BAD_FLOAT8)
def test_bad_input_of_float8_writes_nothing(device, message):
    cache = paged(device, [20, 5], dtype=FLOAT8)
    check_refused(cache, *new_tokens(2, cache, dtype=torch.float32), message, BAD_FLOAT8[message])


def test_scale_on_another_device(device):
    if device == "cpu":
        pytest.skip("needs a second device")
    cache = paged(device, [20, 5], dtype=FLOAT8)
    change = {"k_scale": torch.ones(2)}
    check_refused(
        cache, *new_tokens(2, cache, dtype=torch.float32), "k_scale: expected device", lambda a: a.update(change)
    )

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
    paged,
    queries,
    random_lists,
    relative_error,
    without_nan,
)
from hypothesis import given, settings
from hypothesis import strategies as st

import lil_ops
from lil_ops import reference

OPERATOR = "sparse_decode"


def tensors(cache, q):
    return q, cache.k, cache.v, cache.page_table, cache.seq_lens


def check(cache, q, pages=None, counts=None, **options):
    options |= cache.scales
    out, lse = lil_ops.sparse_decode(*tensors(cache, q), pages, counts, **options)
    want_out, want_lse = reference.sparse_decode(*tensors(cache, q), pages, counts, **options)
    assert out.dtype == q.dtype and lse.dtype == torch.float32
    assert relative_error(out, want_out) < TOLERANCE[q.dtype]
    assert relative_error(lse, want_lse) < 1e-5
    return out, lse


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_dense(device, dtype, head_dim):
    cache = paged(device, [1000, 1, 0, 257], head_dim=head_dim, dtype=dtype)
    out, lse = check(cache, queries(device, 4, 8, head_dim, dtype))
    assert (out[2] == 0).all() and lse[2].isneginf().all()


@pytest.mark.parametrize(
    ("batch", "kv_heads", "group", "head_dim"), [(12, 8, 16, 128), (40, 2, 8, 256), (24, 4, 16, 96), (70, 1, 5, 64)]
)
def test_batches_of_many_heads(device, batch, kv_heads, group, head_dim):
    """Where few splits share a head, each owns more elements than it has threads."""
    lengths = [100 + 11 * b % 190 for b in range(batch)]
    cache = paged(device, lengths, kv_heads=kv_heads, head_dim=head_dim, dtype=torch.bfloat16)
    check(cache, queries(device, batch, kv_heads * group, head_dim, torch.bfloat16))


@pytest.mark.parametrize("batch, kv_heads", [(8, 2), (17, 1), (5, 3)])
def test_many_heads_of_long_sequences(device, batch, kv_heads):
    """More of them than a device runs clusters of eight blocks at once."""
    cache = paged(device, [1000 + 170 * b for b in range(batch)], kv_heads=kv_heads, dtype=torch.bfloat16)
    check(cache, queries(device, batch, kv_heads * 6, 64, torch.bfloat16))


def test_the_table_may_be_wider_than_the_sequences(device):
    """Capacities choose another way of merging, and not another result."""
    cache = paged(device, [700, 33], kv_heads=2, head_dim=128, dtype=torch.bfloat16)
    q = queries(device, 2, 8, 128, torch.bfloat16)
    narrow = lil_ops.sparse_decode(*tensors(cache, q))
    cache.page_table = torch.nn.functional.pad(cache.page_table, (0, 4000), value=-1)
    wide = lil_ops.sparse_decode(*tensors(cache, q))
    assert all(torch.equal(a, b) for a, b in zip(narrow, wide, strict=True))


@pytest.mark.parametrize("page_size", PAGE_SIZES)
@pytest.mark.parametrize("group", [1, 2, 3, 4, 5, 7, 8, 12])
def test_groups_and_pages(device, page_size, group):
    cache = paged(device, [300, 77], kv_heads=2, page_size=page_size, dtype=torch.bfloat16)
    check(cache, queries(device, 2, 2 * group, 64, torch.bfloat16))


@settings(max_examples=80, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 400), min_size=1, max_size=3),
    page_size=st.sampled_from([8, 16, 32]),
    group=st.integers(1, 6),
    kv_dtype=st.sampled_from(DTYPES),
    q_dtype=st.sampled_from(DTYPES),
    per_head=st.booleans(),
    nhd=st.booleans(),
    with_counts=st.booleans(),
    window=st.sampled_from([0, 1, 30, 1000]),
    softcap=st.sampled_from([0.0, 5.0]),
    seed=st.integers(0, 999),
)
def test_selected_pages(
    device, lengths, page_size, group, kv_dtype, q_dtype, per_head, nhd, with_counts, window, softcap, seed
):
    """Lists with duplicates, -1 anywhere, any order, and entries past the count that must not be looked at."""
    cache = paged(
        device, lengths, kv_heads=2, page_size=page_size, dtype=kv_dtype, per_head=per_head, nhd=nhd, seed=seed
    )
    pages, counts = random_lists(cache, 2, 9, seed, with_counts=with_counts)
    q = queries(device, len(lengths), 2 * group, 64, q_dtype, seed)
    check(cache, q, pages, counts, window=window, softcap=softcap, scale=0.2)


@pytest.mark.parametrize("scales", SCALES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_float8(device, dtype, head_dim, scales):
    cache = paged(device, [600, 1, 0, 257], head_dim=head_dim, dtype=FLOAT8, scales=scales)
    check(cache, queries(device, 4, 8, head_dim, dtype))


@pytest.mark.parametrize("page_size", PAGE_SIZES)
@pytest.mark.parametrize("group", [1, 2, 3, 4, 5, 7, 8, 12, 17])
def test_float8_groups_and_pages(device, page_size, group):
    cache = paged(device, [300, 77], page_size=page_size, dtype=FLOAT8, scales="page")
    check(cache, queries(device, 2, 2 * group, 64, torch.bfloat16))


@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 400), min_size=1, max_size=3),
    page_size=st.sampled_from([8, 16, 32, 128]),
    group=st.integers(1, 6),
    head_dim=st.sampled_from([64, 80, 128]),
    q_dtype=st.sampled_from(DTYPES),
    scales=st.sampled_from(SCALES),
    per_head=st.booleans(),
    nhd=st.booleans(),
    listed=st.booleans(),
    window=st.sampled_from([0, 30]),
    softcap=st.sampled_from([0.0, 5.0]),
    seed=st.integers(0, 999),
)
def test_float8_selected_pages(
    device, lengths, page_size, group, head_dim, q_dtype, scales, per_head, nhd, listed, window, softcap, seed
):
    cache = paged(device, lengths, head_dim=head_dim, page_size=page_size, dtype=FLOAT8, scales=scales,
                  per_head=per_head, nhd=nhd, seed=seed)  # fmt: skip
    q = queries(device, len(lengths), 2 * group, head_dim, q_dtype, seed)
    lists = random_lists(cache, 2, 9, seed) if listed else ()
    check(cache, q, *lists, window=window, softcap=softcap, scale=0.2)


def test_float8_is_as_its_real_values(device):
    """Scales apart, a float8 cache is a float32 cache of the same values."""
    cache = paged(device, [300, 77], dtype=FLOAT8)
    q = queries(device, 2, 4, 64)
    same = lil_ops.sparse_decode(q, cache.k.float(), cache.v.float(), cache.page_table, cache.seq_lens)
    for actual, expected in zip(lil_ops.sparse_decode(*tensors(cache, q)), same, strict=True):
        assert relative_error(actual, expected) < 1e-6


@pytest.mark.parametrize("dtype", DTYPES)
def test_float8_scales_of_any_size(device, dtype):
    """Values that are very small or large are scaled in float32; bfloat16 queries reach further than halves do."""
    cache = paged(device, [100, 90, 80], dtype=FLOAT8)
    factors = torch.tensor([1e-3, 1.0, 1e3]) if dtype == torch.float16 else torch.tensor([1e-8, 1.0, 1e8])
    q = (queries(device, 3, 4, 64) * factors[:, None, None].to(device)).to(dtype)
    cache.k_scale = torch.ones(len(cache.k), 2, device=device)
    cache.v_scale = torch.ones(len(cache.k), 2, device=device)
    for b in range(3):
        physical = cache.page_table[b][cache.page_table[b] >= 0].long()
        cache.k_scale[physical] = 1 / factors[b].to(device)
        powers = torch.randint(-3, 4, (len(physical), 2), generator=torch.Generator().manual_seed(b))
        cache.v_scale[physical] = (10.0**powers).to(device)
    out, lse = lil_ops.sparse_decode(*tensors(cache, q), **cache.scales)
    want_out, want_lse = reference.sparse_decode(*tensors(cache, q), **cache.scales)
    for b in range(3):
        assert relative_error(out[b], want_out[b]) < TOLERANCE[dtype]
        assert relative_error(lse[b], want_lse[b]) < 1e-5


def masses(cache, q, pages=None, *, which=("page", "token")):
    """Outputs to be filled; NaN shows what is not written."""
    capacity = cache.page_table.size(-1) if pages is None else pages.size(-1)
    widths = {"page": capacity, "token": capacity * cache.k.size(2)}
    return {f"{name}_mass": q.new_full((*q.shape[:2], widths[name]), torch.nan, dtype=torch.float32) for name in which}


def check_masses(cache, q, pages=None, counts=None, **options):
    options |= cache.scales
    without = lil_ops.sparse_decode(*tensors(cache, q), pages, counts, **options)
    want = reference.attention_mass(
        q, cache.k, cache.page_table, cache.seq_lens, pages, counts,
        **{name: value for name, value in options.items() if name != "v_scale"},
    )  # fmt: skip
    written = masses(cache, q, pages)
    for outputs in (written, masses(cache, q, pages, which=["page"]), masses(cache, q, pages, which=["token"])):
        out, lse = lil_ops.sparse_decode(*tensors(cache, q), pages, counts, **options, **outputs)
        assert torch.equal(out, without[0]) and torch.equal(lse, without[1])
        for name, mass in outputs.items():
            assert torch.equal(mass, written[name])
    for mass, expected in zip(written.values(), want, strict=True):
        assert mass.isfinite().all() and (mass[expected == 0] == 0).all()
        assert relative_error(mass, expected) < 1e-5
    return *written.values(), lse


@pytest.mark.parametrize("kv_dtype", [*DTYPES, FLOAT8])
@pytest.mark.parametrize("dtype", DTYPES)
def test_masses(device, dtype, kv_dtype):
    cache = paged(device, [1000, 1, 0, 257], head_dim=128, dtype=kv_dtype)
    page_mass, token_mass, _ = check_masses(cache, queries(device, 4, 8, 128, dtype))
    for mass in (page_mass, token_mass):
        torch.testing.assert_close(mass.sum(-1), cache.seq_lens.sign()[:, None].expand(4, 8).float())


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_masses_of_head_dims(device, head_dim):
    cache = paged(device, [300, 77], head_dim=head_dim, dtype=torch.bfloat16)
    q = queries(device, 2, 10, head_dim, torch.bfloat16)
    check_masses(cache, q)
    check_masses(cache, q, *random_lists(cache, 2, 7))


@pytest.mark.parametrize("page_size", PAGE_SIZES)
@pytest.mark.parametrize("group", [1, 3, 4, 8, 12, 17])
def test_masses_of_groups_and_pages(device, page_size, group):
    cache = paged(device, [300, 77], page_size=page_size, dtype=torch.bfloat16)
    q = queries(device, 2, 2 * group, 64, torch.bfloat16)
    check_masses(cache, q)
    check_masses(cache, q, *random_lists(cache, 2, 7))


@settings(max_examples=80, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 400), min_size=1, max_size=3),
    page_size=st.sampled_from(PAGE_SIZES),
    group=st.integers(1, 6),
    kv_dtype=st.sampled_from([*DTYPES, FLOAT8]),
    q_dtype=st.sampled_from(DTYPES),
    per_head=st.booleans(),
    nhd=st.booleans(),
    listed=st.sampled_from(["not", "all count", "counted"]),
    holes=st.booleans(),
    window=st.sampled_from([0, 1, 30, 1000]),
    softcap=st.sampled_from([0.0, 5.0]),
    seed=st.integers(0, 999),
)
def test_any_masses(
    device, lengths, page_size, group, kv_dtype, q_dtype, per_head, nhd, listed, holes, window, softcap, seed
):
    scales = SCALES[seed % 3] if kv_dtype == FLOAT8 else None
    cache = paged(device, lengths, page_size=page_size, dtype=kv_dtype, per_head=per_head, nhd=nhd, seed=seed,
                  scales=scales)  # fmt: skip
    if holes:
        cache.page_table[..., ::3] = -1
    lists = () if listed == "not" else random_lists(cache, 2, 9, seed, with_counts=listed == "counted")
    q = queries(device, len(lengths), 2 * group, 64, q_dtype, seed)
    check_masses(cache, q, *lists, window=window, softcap=softcap, scale=0.2)


def test_masses_of_a_covering_list(device):
    cache = paged(device, [1000, 15, 512], kv_heads=3, head_dim=128, dtype=torch.bfloat16)
    q = queries(device, 3, 15, 128, torch.bfloat16)
    scores = torch.randn(3, 3, cache.page_table.size(1), device=device)
    pages, counts = lil_ops.select_pages(scores, cache.seq_lens, 16, 4096)
    page_mass, token_mass, _ = check_masses(cache, q, pages, counts)
    torch.testing.assert_close(page_mass.sum(-1), torch.ones(3, 15, device=device))
    torch.testing.assert_close(token_mass.view(3, 15, -1, 16).sum(-1), page_mass)
    dense = check_masses(cache, q)
    assert torch.equal(page_mass, dense[0]) and torch.equal(token_mass, dense[1])


def test_masses_of_a_long_sequence(device):
    """More tokens than one block, split or chunk takes; and a table much wider than the sequences."""
    cache = paged(device, [9000, 40], page_size=32, dtype=torch.bfloat16)
    cache.page_table = torch.nn.functional.pad(cache.page_table, (0, 900), value=-1)
    q = queries(device, 2, 4, 64, torch.bfloat16)
    outputs = masses(cache, q)
    _, lse = lil_ops.sparse_decode(*tensors(cache, q), **outputs)
    keys = cache.k[cache.page_table[0, :282].long()].double().transpose(0, 1).flatten(1, 2)[:, :9000]
    logits = torch.einsum("hgd,htd->hgt", q[0].double().view(2, 2, 64), keys).flatten(0, 1) / 8
    assert relative_error(lse[0], logits.logsumexp(-1)) < 1e-5
    token_mass = outputs["token_mass"]
    assert relative_error(token_mass[0, :, :9000], logits.softmax(-1)) < 1e-5
    assert (token_mass[0, :, 9000:] == 0).all() and (token_mass[1, :, 40:] == 0).all()
    assert relative_error(outputs["page_mass"], token_mass.view(2, 4, -1, 32).double().sum(-1)) < 1e-6


def test_masses_of_what_reads_nothing(device):
    """A head whose list is empty, whose pages are not mapped, or whose logits are all -inf."""
    cache = paged(device, [100, 100, 100, 0])
    cache.page_table[0] = -1
    q = queries(device, 4, 4, 64).abs()
    cache.k[cache.page_table[1, :7], 0, :, 0] = -torch.inf
    _, _, lse = check_masses(cache, q)
    assert lse[0].isneginf().all() and lse[1, :2].isneginf().all() and lse[3].isneginf().all()
    pages = torch.tensor([3, -1, 0], device=device, dtype=torch.int32).expand(4, 2, 3).contiguous()
    pages[3] = -1
    counts = torch.tensor([[3, 3], [3, 3], [0, 1], [3, 0]], device=device, dtype=torch.int32)
    page_mass, _, lse = check_masses(cache, q, pages, counts)
    assert (page_mass[2, :2] == 0).all() and lse[2, :2].isneginf().all()
    assert page_mass[2, 2].tolist() == [1.0, 0.0, 0.0]
    check_masses(cache, q, torch.empty((4, 2, 0), dtype=torch.int32, device=device))


def test_masses_of_an_empty_batch(device):
    cache = paged(device, [])
    q = queries(device, 0, 4, 64)
    outputs = masses(cache, q)
    out, lse = lil_ops.sparse_decode(*tensors(cache, q), **outputs)
    assert out.shape == q.shape and lse.shape == q.shape[:2] and all(t.numel() == 0 for t in outputs.values())


def test_nan_stays_in_the_masses_of_its_sequence(device):
    cache = paged(device, [40, 40])
    q = queries(device, 2, 4, 64)
    clean, outputs = masses(cache, q), masses(cache, q)
    lil_ops.sparse_decode(*tensors(cache, q), **clean)
    cache.k[cache.page_table[0, 1], 0, 3, 0] = torch.nan
    lil_ops.sparse_decode(*tensors(cache, q), **outputs)
    for name, mass in outputs.items():
        assert mass[0, :2].isnan().any(-1).all()
        assert torch.equal(mass[0, 2:], clean[name][0, 2:]) and torch.equal(mass[1], clean[name][1])


def test_nan_does_not_reach_the_mass_of_what_is_not_read(device):
    cache = paged(device, [40, 40])
    q = queries(device, 2, 4, 64)
    pages = torch.tensor([0, -1, 2], dtype=torch.int32, device=device).expand(2, 2, 3)  # the third is half a page
    outputs = masses(cache, q, pages)
    cache.k[cache.page_table[0, 0], 0, 3, 0] = torch.nan
    lil_ops.sparse_decode(*tensors(cache, q), pages, **outputs)
    tokens = outputs["token_mass"].view(2, 4, 3, 16)
    assert tokens[0, :2].isnan().any() and (tokens[:, :, 1] == 0).all() and (tokens[:, :, 2, 8:] == 0).all()
    assert (outputs["page_mass"][..., 1] == 0).all()


@pytest.mark.parametrize("v_scale", [torch.nan, torch.inf, 1e30])
def test_the_scale_of_a_page_outside_the_window_is_not_looked_at(device, v_scale):
    cache = paged(device, [100], dtype=FLOAT8, scales="page")
    cache.v_scale[cache.page_table[0, 1]] = v_scale
    check(cache, queries(device, 1, 4, 64, torch.bfloat16), window=40)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, FLOAT8])
def test_a_sink_of_no_value_beside_many_light_tokens(device, dtype):
    """Nearly all the mass is on a token whose values are 0: what counts are weights far below the largest."""
    batch = 1 if device == "cpu" else 300  # so many that one block reads a whole sequence
    pages, head_dim = 8192, 64
    g = torch.Generator().manual_seed(0)
    k, v = torch.zeros(pages, 1, 16, head_dim), 0.3 + torch.randn(pages, 1, 16, head_dim, generator=g)
    k[0, 0, 0, 0], v[0, 0, 0] = 18.0, 0
    q = torch.zeros(batch, 1, head_dim, dtype=torch.float16, device=device)
    q[..., 0] = 1.0
    k, v = (t.to(device).to(dtype) for t in (k, v))
    table = torch.arange(pages, dtype=torch.int32, device=device).expand(batch, pages)
    lengths = torch.full((batch,), pages * 16, dtype=torch.int32, device=device)
    q = q.to(torch.bfloat16) if dtype == torch.bfloat16 else q
    out, _ = lil_ops.sparse_decode(q, k, v, table, lengths, scale=1.0)
    weights = (k[..., 0].double() - 18).exp().flatten()
    want = (weights @ v.double().view(-1, head_dim)) / weights.sum()
    assert relative_error(out, want.expand(batch, 1, head_dim)) < TOLERANCE[q.dtype]


def test_masses_are_the_same_in_every_run_and_on_any_number_of_threads(device):
    cache = paged(device, [3000, 900], head_dim=128, dtype=torch.bfloat16)
    q = queries(device, 2, 8, 128, torch.bfloat16)
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 3, 2):
            torch.set_num_threads(count)
            results.append(masses(cache, q))
            lil_ops.sparse_decode(*tensors(cache, q), **results[-1])
    finally:
        torch.set_num_threads(threads)
    for result in results:
        assert all(torch.equal(result[name], results[0][name]) for name in result)


@pytest.mark.parametrize("dtype", [*DTYPES, FLOAT8])
@pytest.mark.parametrize("window", [0, 100])
@pytest.mark.parametrize("lengths", [[1000, 15, 512], [1000, 15, 512, 300, 0, 5000]])
def test_covering_list_equals_dense_bit_for_bit(device, dtype, window, lengths):
    """Also of more heads than the largest clusters run at once, of which some have long lists."""
    cache = paged(device, lengths, kv_heads=3, head_dim=128, dtype=dtype)
    q = queries(device, len(lengths), 15, 128, torch.bfloat16 if dtype == FLOAT8 else dtype)
    scores = torch.randn(len(lengths), 3, cache.page_table.size(1), device=device)
    pages, counts = lil_ops.select_pages(scores, cache.seq_lens, 16, 8192)
    sparse = lil_ops.sparse_decode(*tensors(cache, q), pages, counts, window=window)
    dense = lil_ops.sparse_decode(*tensors(cache, q), window=window)
    assert all(torch.equal(a, b) for a, b in zip(sparse, dense, strict=True))


def test_same_bits_every_run_and_on_any_number_of_threads(device):
    cache = paged(device, [5000, 900], kv_heads=2, head_dim=128, dtype=torch.bfloat16)
    q = queries(device, 2, 8, 128, torch.bfloat16)
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 3, 2):
            torch.set_num_threads(count)
            results.append(lil_ops.sparse_decode(*tensors(cache, q)))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(out, results[0][0]) and torch.equal(lse, results[0][1]) for out, lse in results)


def test_scale_of_zero_is_the_mean(device):
    cache = paged(device, [77])
    check(cache, queries(device, 1, 4, 64), scale=0.0, softcap=5.0)


@pytest.mark.parametrize("softcap", [50.0, 1e3, 1e6])
@pytest.mark.parametrize("scale", [1e-3, 0.1, 3.0])
def test_a_softcap_far_above_the_logits(device, softcap, scale):
    """Its tanh is of numbers near 0, of which every digit counts."""
    cache = paged(device, [77, 1, 300])
    check(cache, queries(device, 3, 4, 64), scale=scale, softcap=softcap, window=50)


def test_large_logits(device):
    cache = paged(device, [300])
    cache.k.mul_(100)
    check(cache, queries(device, 1, 4, 64) * 10)


def test_nan_and_inf_stay_in_their_sequence(device):
    cache = paged(device, [40, 40, 40])
    q = queries(device, 3, 4, 64)
    clean, _ = lil_ops.sparse_decode(*tensors(cache, q))
    cache.v[cache.page_table[0, 1], 0, 3, 0] = torch.nan
    cache.k[cache.page_table[1, 1], 0, 3, 0] = torch.inf
    out, _ = lil_ops.sparse_decode(*tensors(cache, q))
    assert out[0, :2, 0].isnan().all() and out[1, :2].isnan().any()
    assert torch.equal(out[2], clean[2]) and torch.equal(out[:2, 2:], clean[:2, 2:])


def test_logits_of_minus_infinity_weigh_nothing(device):
    """Those of more than a chunk, and all that a head reads: then it is as if it read nothing."""
    cache = paged(device, [1000, 1000, 40])
    q = queries(device, 3, 4, 64).abs()
    cache.k[cache.page_table[0, :40], :, :, 0] = -torch.inf
    nothing = cache.page_table[1, :63]
    cache.k[nothing, 0, :, 0] = -torch.inf
    cache.v[nothing[3], 0] = torch.nan
    out, lse = check(cache, q)
    assert (out[1, :2] == 0).all() and lse[1, :2].isneginf().all() and lse[1, 2:].isfinite().all()
    # NaN among them shows.
    cache.k[nothing[3], 0, 5, 0] = torch.nan
    out, lse = lil_ops.sparse_decode(*tensors(cache, q))
    assert out[1, :2].isnan().all() and lse[1, :2].isnan().all() and out[[0, 2]].isfinite().all()


@pytest.mark.parametrize("per_head", [False, True])
def test_unmapped_pages_are_skipped(device, per_head):
    cache = paged(device, [1000, 300, 70], kv_heads=3, dtype=torch.bfloat16, per_head=per_head)
    holes = torch.rand(cache.page_table.shape, generator=torch.Generator().manual_seed(0)) < 0.4
    holes[2] = True
    cache.page_table[holes.to(device)] = -1
    q = queries(device, 3, 6, 64, torch.bfloat16)
    dense = check(cache, q)
    assert (dense[0][2] == 0).all() and dense[1][2].isneginf().all()
    scores = torch.randn(3, 3, cache.page_table.size(-1), device=device)
    sparse = check(cache, q, *lil_ops.select_pages(scores, cache.seq_lens, 16, 4096))
    assert all(torch.equal(a, b) for a, b in zip(sparse, dense, strict=True))
    check(cache, q, *lil_ops.select_pages(scores, cache.seq_lens, 16, 256))


def test_pages_outside_the_window_may_be_unmapped(device):
    cache = paged(device, [1000, 15])
    q = queries(device, 2, 4, 64)
    mapped = lil_ops.sparse_decode(*tensors(cache, q), window=100)
    cache.page_table[0, : 900 // 16] = -1
    unmapped = lil_ops.sparse_decode(*tensors(cache, q), window=100)
    assert all(torch.equal(a, b) for a, b in zip(mapped, unmapped, strict=True))


def test_empty_cases(device):
    cache = paged(device, [])
    out, lse = lil_ops.sparse_decode(*tensors(cache, queries(device, 0, 4, 64)))
    assert out.shape == (0, 4, 64) and lse.shape == (0, 4)
    cache = paged(device, [40])
    out, lse = check(cache, queries(device, 1, 4, 64), torch.full((1, 2, 3), -1, dtype=torch.int32, device=device))
    assert (out == 0).all() and lse.isneginf().all()
    check(cache, queries(device, 1, 4, 64), torch.empty((1, 2, 0), dtype=torch.int32, device=device))


def test_strided_queries(device):
    cache = paged(device, [40, 50])
    check(cache, queries(device, 4, 2, 64).transpose(0, 1))


def test_opcheck(device):
    cache = paged(device, [40, 7])
    args = (queries(device, 2, 4, 64), cache.k.nan_to_num(), cache.v.nan_to_num(), cache.page_table, cache.seq_lens)
    torch.library.opcheck(torch.ops.lil.sparse_decode.default, args)
    pages, counts = (
        torch.zeros((2, 2, 1), dtype=torch.int32, device=device),
        torch.ones((2, 2), dtype=torch.int32, device=device),
    )
    torch.library.opcheck(torch.ops.lil.sparse_decode.default, (*args, pages, counts), {"scale": 0.5})
    for options in ({"which": ["page"]}, {"which": ["token"]}, {}):
        outputs = {name: mass.nan_to_num() for name, mass in masses(cache, args[0], pages, **options).items()}
        torch.library.opcheck(torch.ops.lil.sparse_decode.default, (*args, pages, counts), outputs)
    cache = paged(device, [40, 7], dtype=FLOAT8, scales="head")
    args = (args[0], without_nan(cache.k), without_nan(cache.v), cache.page_table, cache.seq_lens)
    torch.library.opcheck(torch.ops.lil.sparse_decode.default, args, cache.scales, test_utils=OPCHECKS_OF_FLOAT8)


BAD = {
    "q: expected shape": lambda a: a.update(q=a["q"][..., :32]),
    "q: expected q_heads a multiple": lambda a: a.update(q=a["q"][:, :3]),
    "q: expected dtype": lambda a: a.update(q=a["q"].int()),
    "q: expected a contiguous last": lambda a: a.update(q=a["q"].transpose(1, 2).contiguous().transpose(1, 2)),
    "k_cache: expected a page size": lambda a: a.update(k_cache=a["k_cache"][:, :, :9], v_cache=a["v_cache"][:, :, :9]),
    "v_cache: expected shape": lambda a: a.update(v_cache=a["v_cache"][:2]),
    "page_table: expected shape": lambda a: a.update(page_table=a["page_table"][:1]),
    "page_table: expected a page from 0": lambda a: a.update(page_table=a["page_table"] * 0 - 2),
    "page_table: expected a page from 0 to": lambda a: a.update(page_table=a["page_table"] * 0 + 1000),
    "seq_lens: expected 0 to": lambda a: a.update(seq_lens=a["seq_lens"] + 1000),
    "pages: expected Int, got Long": lambda a: a.update(pages=a["pages"].long()),
    "pages: expected shape": lambda a: a.update(pages=a["pages"][:, :1]),
    "pages: expected -1 or a page from 0 to 2": lambda a: a["pages"][0].fill_(3),
    "pages: expected -1 or a page": lambda a: a.update(pages=a["pages"] - 2),
    "counts: expected 0 to 1": lambda a: a.update(counts=a["counts"] + 1),
    "counts: expected None": lambda a: a.update(pages=None),
    "window: expected": lambda a: a.update(window=-1),
    "softcap: expected": lambda a: a.update(softcap=-1.0),
    "softcap: expected at least .*, got 1e-60": lambda a: a.update(softcap=1e-60),
    "softcap: expected at least 0": lambda a: a.update(softcap=1e39),
    "scale: expected a number": lambda a: a.update(scale=1e39),
    "q: expected dtype float32, float16 or bfloat16": lambda a: a.update(q=a["q"].to(FLOAT8)),
    "k_cache: expected dtype float32, float16, bfloat16 or float8": lambda a: a.update(k_cache=a["k_cache"].int()),
    "v_cache: expected Float, got Float8": lambda a: a.update(v_cache=a["v_cache"].to(FLOAT8)),
    "k_scale: expected None where values are not stored as Float8": lambda a: a.update(k_scale=torch.ones(2)),
    "v_scale: expected None where values are not stored as Float8": lambda a: a.update(v_scale=torch.ones(2)),
    "k_scale: expected Float, got BFloat16": lambda a: as_float8(a, k_scale=torch.ones(2).bfloat16()),
    "k_scale: expected shape \\[kv_heads\\]": lambda a: as_float8(a, k_scale=torch.ones(1)),
    "v_scale: expected shape \\[num_pages, kv_heads\\]": lambda a: as_float8(a, v_scale=torch.ones(2, 2)),
    "v_scale: expected a contiguous": lambda a: as_float8(a, v_scale=torch.ones(2, len(a["v_cache"])).T),
    "page_mass: expected Float, got Half": lambda a: a.update(page_mass=a["page_mass"].half()),
    "page_mass: expected shape \\[batch, q_heads, capacity\\] = \\[2, 4, 1\\]": lambda a: a.update(
        page_mass=a["token_mass"]
    ),
    "page_mass: expected shape \\[batch, q_heads, capacity\\] = \\[2, 4, 4\\]": lambda a: a.update(
        pages=None, counts=None
    ),
    "token_mass: expected Float, got Double": lambda a: a.update(token_mass=a["token_mass"].double()),
    "token_mass: expected shape": lambda a: a.update(token_mass=a["page_mass"]),
    "token_mass: expected a contiguous": lambda a: a.update(
        token_mass=a["token_mass"].transpose(1, 2).contiguous().transpose(1, 2)
    ),
}


def as_float8(a, **scales):
    a.update(k_cache=a["k_cache"].to(FLOAT8), v_cache=a["v_cache"].to(FLOAT8))
    a.update({name: scale.to(a["q"].device) for name, scale in scales.items()})


@pytest.mark.parametrize("message", BAD)
def test_bad_input(device, message):
    cache = paged(device, [40, 7])
    args = dict(q=queries(device, 2, 4, 64), k_cache=cache.k, v_cache=cache.v, page_table=cache.page_table,
                seq_lens=cache.seq_lens, pages=torch.zeros((2, 2, 1), dtype=torch.int32, device=device),
                counts=torch.ones((2, 2), dtype=torch.int32, device=device),
                page_mass=torch.full((2, 4, 1), 7.0, device=device),
                token_mass=torch.full((2, 4, 16), 7.0, device=device))  # fmt: skip
    outputs = args["page_mass"], args["token_mass"]
    BAD[message](args)
    with pytest.raises(RuntimeError, match=f"lil::sparse_decode: {message}"):
        lil_ops.sparse_decode(**args)
        lil_ops.check_errors()
    if device == "cpu" or message not in SEEN_ON_THE_DEVICE:
        assert all((mass == 7).all() for mass in outputs)


SEEN_ON_THE_DEVICE = [m for m in BAD if "from 0" in m or "0 to" in m or "-1 or a page" in m]


def test_wrong_device(device):
    if device == "cpu":
        pytest.skip("needs a second device")
    cache = paged(device, [40])
    with pytest.raises(RuntimeError, match="lil::sparse_decode: q: expected device cuda:0, got cpu"):
        lil_ops.sparse_decode(*tensors(cache, queries("cpu", 1, 4, 64)))
    q = queries(device, 1, 4, 64)
    for name in ("page_mass", "token_mass"):
        with pytest.raises(RuntimeError, match=f"lil::sparse_decode: {name}: expected device cuda:0, got cpu"):
            lil_ops.sparse_decode(*tensors(cache, q), **{name: masses(cache, q)[name].cpu()})

import pytest
import torch
from cases import DTYPES, HEAD_DIMS, PAGE_SIZES, TOLERANCE, paged, queries, relative_error
from hypothesis import given, settings
from hypothesis import strategies as st

import lil_ops
from lil_ops import reference

OPERATOR = "sparse_decode"


def tensors(cache, q):
    return q, cache.k, cache.v, cache.page_table, cache.seq_lens


def check(cache, q, pages=None, counts=None, **options):
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
    g = torch.Generator().manual_seed(seed)
    pages = torch.full((len(lengths), 2, 9), -1, dtype=torch.int32)
    for b, n in enumerate(lengths):
        pages[b] = torch.randint(-1, max(1, -(-n // page_size)), (2, 9), generator=g) if n else -1
    counts = None
    if with_counts:
        counts = torch.randint(0, 10, (len(lengths), 2), generator=g, dtype=torch.int32)
        pages[torch.arange(9) >= counts[..., None]] = 12345
    q = queries(device, len(lengths), 2 * group, 64, q_dtype, seed)
    pages, counts = pages.to(device), None if counts is None else counts.to(device)
    check(cache, q, pages, counts, window=window, softcap=softcap, scale=0.2)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("window", [0, 100])
def test_covering_list_equals_dense_bit_for_bit(device, dtype, window):
    cache = paged(device, [1000, 15, 512], kv_heads=3, head_dim=128, dtype=dtype)
    q = queries(device, 3, 15, 128, dtype)
    scores = torch.randn(3, 3, cache.page_table.size(1), device=device)
    pages, counts = lil_ops.select_pages(scores, cache.seq_lens, 16, 4096)
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
}


@pytest.mark.parametrize("message", BAD)
def test_bad_input(device, message):
    cache = paged(device, [40, 7])
    args = dict(q=queries(device, 2, 4, 64), k_cache=cache.k, v_cache=cache.v, page_table=cache.page_table,
                seq_lens=cache.seq_lens, pages=torch.zeros((2, 2, 1), dtype=torch.int32, device=device),
                counts=torch.ones((2, 2), dtype=torch.int32, device=device))  # fmt: skip
    BAD[message](args)
    with pytest.raises(RuntimeError, match=f"lil::sparse_decode: {message}"):
        lil_ops.sparse_decode(**args)
        lil_ops.check_errors()


def test_wrong_device(device):
    if device == "cpu":
        pytest.skip("needs a second device: a meta tensor would only choose the fake kernel")
    cache = paged(device, [40])
    with pytest.raises(RuntimeError, match="lil::sparse_decode: q: expected device cuda:0, got cpu"):
        lil_ops.sparse_decode(*tensors(cache, queries("cpu", 1, 4, 64)))

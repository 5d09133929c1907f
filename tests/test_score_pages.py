import math

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
    relative_error,
    without_nan,
)
from hypothesis import given, settings
from hypothesis import strategies as st

import lil_ops
from lil_ops import reference
from lil_ops.reference._pages import page_scale

OPERATOR = "score_pages"


def check(cache, q, page_size, **options):
    args = (q, cache.summary, cache.page_table, cache.seq_lens, page_size)
    options["k_scale"] = cache.k_scale
    actual, expected = lil_ops.score_pages(*args, **options), reference.score_pages(*args, **options)
    assert actual.dtype == torch.float32 and actual.shape == expected.shape
    # Scores are fp32 whatever the dtype read; meanstd squares, which the tensor cores take in the queries' dtype.
    tolerance = TOLERANCE[q.dtype] if options.get("summary_mode") == "meanstd" else 1e-5
    assert relative_error(actual, expected) < tolerance
    return actual


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_matches_reference(device, dtype, head_dim):
    cache = paged(device, [100, 1, 0, 1500], head_dim=head_dim, dtype=dtype)
    check(cache, queries(device, 4, 8, head_dim, dtype), 16)


@settings(max_examples=40, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 300), min_size=1, max_size=3),
    page_size=st.sampled_from([8, 16, 64]),
    group=st.integers(1, 9),
    dtypes=st.tuples(st.sampled_from(DTYPES), st.sampled_from(DTYPES)),
    per_head=st.booleans(),
    seed=st.integers(0, 99),
)
def test_any_shape(device, lengths, page_size, group, dtypes, per_head, seed):
    cache = paged(device, lengths, kv_heads=2, page_size=page_size, dtype=dtypes[0], per_head=per_head, seed=seed)
    check(cache, queries(device, len(lengths), 2 * group, 64, dtypes[1], seed), page_size, scale=0.3)


@pytest.mark.parametrize("mode", ["minmax", "meanstd"])
@pytest.mark.parametrize("scales", SCALES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_float8(device, dtype, head_dim, scales, mode):
    cache = paged(device, [100, 1, 0, 700], head_dim=head_dim, dtype=FLOAT8, scales=scales, summary_mode=mode)
    check(cache, queries(device, 4, 8, head_dim, dtype), 16, summary_mode=mode)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_meanstd(device, dtype, head_dim):
    cache = paged(device, [100, 1, 0, 1500], head_dim=head_dim, dtype=dtype, summary_mode="meanstd")
    check(cache, queries(device, 4, 8, head_dim, dtype), 16, summary_mode="meanstd")


@pytest.mark.parametrize("dtype", [*DTYPES, FLOAT8])
def test_meanstd_of_keys_that_are_small_beside_the_queries(device, dtype):
    cache = paged(device, [100, 300], head_dim=128, dtype=dtype, summary_mode="meanstd")
    cache.summary = (cache.summary.float() * 0.02).to(dtype)
    q_dtype = torch.float16 if dtype == FLOAT8 else dtype
    check(cache, (queries(device, 2, 8, 128) * 400).to(q_dtype), 16, summary_mode="meanstd")


@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 300), min_size=1, max_size=3),
    page_size=st.sampled_from(PAGE_SIZES),
    group=st.integers(1, 17),
    head_dim=st.sampled_from(HEAD_DIMS),
    dtypes=st.tuples(st.sampled_from([*DTYPES, FLOAT8]), st.sampled_from(DTYPES)),
    scales=st.sampled_from(SCALES),
    mode=st.sampled_from(["minmax", "meanstd"]),
    per_head=st.booleans(),
    scale=st.sampled_from([None, 0.01, 0.3]),
    seed=st.integers(0, 99),
)
def test_any_mode(device, lengths, page_size, group, head_dim, dtypes, scales, mode, per_head, scale, seed):
    scales = scales if dtypes[0] == FLOAT8 else None
    cache = paged(device, lengths, head_dim=head_dim, page_size=page_size, dtype=dtypes[0], per_head=per_head,
                  seed=seed, scales=scales, summary_mode=mode)  # fmt: skip
    q = queries(device, len(lengths), 2 * group, head_dim, dtypes[1], seed)
    check(cache, q, page_size, scale=scale, summary_mode=mode)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mode", ["minmax", "meanstd"])
def test_queries_that_are_large_or_small_beside_float8_keys(device, dtype, mode):
    """bfloat16 reaches further than the halves that a GPU may multiply float8 as."""
    cache = paged(device, [100, 90, 80], dtype=FLOAT8, scales="page", summary_mode=mode)
    factors = torch.tensor([1e-3, 1.0, 1e3]) if dtype == torch.float16 else torch.tensor([1e-8, 1.0, 1e8])
    q = (queries(device, 3, 4, 64) * factors[:, None, None].to(device)).to(dtype)
    scores = lil_ops.score_pages(
        q, cache.summary, cache.page_table, cache.seq_lens, 16, summary_mode=mode, k_scale=cache.k_scale
    )
    expected = reference.score_pages(
        q, cache.summary, cache.page_table, cache.seq_lens, 16, summary_mode=mode, k_scale=cache.k_scale
    )
    for actual, want in zip(scores, expected, strict=True):
        assert relative_error(actual, want) < (TOLERANCE[dtype] if mode == "meanstd" else 1e-5)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mode", ["minmax", "meanstd"])
def test_queries_of_zeros_and_nan_beside_float8_keys(device, dtype, mode):
    cache = paged(device, [100], head_dim=80, dtype=FLOAT8, summary_mode=mode)
    q = queries(device, 1, 4, 80, dtype)
    q[0, 0], q[0, 3, 7] = 0, torch.nan
    scores = check(cache, q[:, :2].repeat_interleave(2, 1), 16, summary_mode=mode)
    assert (scores[0, 0, :7] == 0).all()
    args = (cache.summary, cache.page_table, cache.seq_lens, 16)
    scores = lil_ops.score_pages(q, *args, summary_mode=mode, k_scale=cache.k_scale)
    assert scores[0, 0, :7].isfinite().all() and scores[0, 1, :7].isnan().all()


@pytest.mark.parametrize("dtype", [torch.float32, FLOAT8])
@pytest.mark.parametrize("scales", SCALES)
@pytest.mark.parametrize("summary_dtype", [None, FLOAT8])
def test_is_an_upper_bound_of_every_logit(device, dtype, scales, summary_dtype):
    if dtype != FLOAT8 and scales:
        pytest.skip("scales are for float8")
    cache = paged(device, [200], kv_heads=1, dtype=dtype, scales=scales, summary_dtype=summary_dtype)
    q = queries(device, 1, 3, 64)
    scores = check(cache, q, 16)[0, 0]
    for page in range(12):
        physical = cache.page_table[0, page]
        keys = cache.k[physical, 0].float() * float(page_scale(cache.k_scale, physical, 0))
        assert (keys @ q[0].T / 8).max() <= scores[page] + 1e-5


def test_meanstd_estimates_the_mass_of_a_page(device):
    """Normal keys with independent elements, for which the formula is made: log of the mean of exp(logit)."""
    page_size, pages = 128, 200
    cache = paged(device, [page_size * pages], kv_heads=1, page_size=page_size, summary_mode="meanstd")
    q = queries(device, 1, 1, 64)
    scores = check(cache, q, page_size, summary_mode="meanstd")[0, 0, :pages]
    logits = (cache.k[cache.page_table[0, :pages].long(), 0].double() @ q[0, 0].double()) / 8
    exact = logits.logsumexp(-1) - math.log(page_size)
    # Each page is a small sample; their mean is close.
    assert (scores - exact).abs().mean() < 0.2 and abs((scores - exact).mean()) < 0.05


@pytest.mark.parametrize("dtype", [*DTYPES, FLOAT8])
def test_meanstd_of_pages_that_do_not_deviate(device, dtype):
    """The logit itself: a page of one token."""
    cache = paged(device, [1, 1], dtype=dtype, summary_mode="meanstd")
    q = queries(device, 2, 2, 64, torch.float32)
    scores = check(cache, q, 16, summary_mode="meanstd")[:, :, 0]
    keys = cache.k.double()[cache.page_table[:, 0].long(), :, 0]
    assert relative_error(scores, (q.double() * keys).sum(-1) / 8) < 1e-5


@pytest.mark.parametrize("representatives", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_representative(device, dtype, head_dim, representatives):
    cache = paged(device, [100, 1, 0, 1500], head_dim=head_dim, dtype=dtype, summary_mode="representative",
                  representatives=representatives)  # fmt: skip
    check(cache, queries(device, 4, 8, head_dim, dtype), 16, summary_mode="representative")


@settings(max_examples=80, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 700), min_size=1, max_size=3),
    page_size=st.sampled_from(PAGE_SIZES),
    head_dim=st.sampled_from(HEAD_DIMS),
    group=st.integers(1, 17),
    representatives=st.integers(1, 16),
    dtypes=st.tuples(st.sampled_from([*DTYPES, FLOAT8]), st.sampled_from(DTYPES)),
    scales=st.sampled_from(SCALES),
    per_head=st.booleans(),
    scale=st.sampled_from([None, 0.3]),
    seed=st.integers(0, 99),
)
def test_any_representatives(
    device, lengths, page_size, head_dim, group, representatives, dtypes, scales, per_head, scale, seed
):
    scales = scales if dtypes[0] == FLOAT8 else None
    cache = paged(device, lengths, head_dim=head_dim, page_size=page_size, dtype=dtypes[0], per_head=per_head,
                  seed=seed, scales=scales, summary_mode="representative", representatives=representatives)  # fmt: skip
    q = queries(device, len(lengths), 2 * group, head_dim, dtypes[1], seed)
    check(cache, q, page_size, scale=scale, summary_mode="representative")


def test_representatives_that_are_a_part_of_a_larger_tensor(device):
    cache = paged(device, [100, 700], summary_mode="representative", representatives=16)
    cache.summary = cache.summary[:, :, 3:8]
    check(cache, queries(device, 2, 6, 64), 16, summary_mode="representative")


def test_all_keys_of_a_page_as_representatives(device):
    """The mean of its logits."""
    cache = paged(device, [40, 24], page_size=8, summary_mode="representative", representatives=8)
    q = queries(device, 2, 2, 64)
    scores = check(cache, q, 8, summary_mode="representative")
    keys = cache.k[cache.page_table[0, :5].long()].double()
    logits = torch.einsum("phtd,hd->hpt", keys, q[0].double()) / 8
    assert relative_error(scores[0, :, :5], logits.mean(-1)) < 1e-5


def test_compiled_with_representatives(device):
    cache = paged(device, [100, 30], summary_mode="representative", representatives=4)

    def score(q, *arguments):
        return lil_ops.score_pages(q * 2, *arguments, 16, summary_mode="representative") + 1

    arguments = queries(device, 2, 6, 64), cache.summary, cache.page_table, cache.seq_lens
    torch._dynamo.reset()
    torch.testing.assert_close(torch.compile(score, fullgraph=True)(*arguments), score(*arguments), rtol=0, atol=0)
    torch._dynamo.reset()


@pytest.mark.parametrize("mode", ["minmax", "representative"])
def test_unmapped_page_scores_minus_infinity(device, mode):
    cache = paged(device, [100], summary_mode=mode)
    cache.page_table[0, 3] = -1
    q = queries(device, 1, 2, 64)
    scores = lil_ops.score_pages(q, cache.summary, cache.page_table, cache.seq_lens, 16, summary_mode=mode)
    assert scores[0, :, 3].isneginf().all() and scores[0, :, [0, 1, 2, 4, 5, 6]].isfinite().all()


@pytest.mark.parametrize("mode", ["minmax", "representative"])
def test_nan_stays_in_its_sequence(device, mode):
    cache = paged(device, [40, 40])
    q = queries(device, 2, 2, 64)
    q[0, 0, 7] = torch.nan
    scores = lil_ops.score_pages(q, cache.summary, cache.page_table, cache.seq_lens, 16, summary_mode=mode)
    assert scores[0, 0, :3].isnan().all() and scores[1, :, :3].isfinite().all() and scores[0, 1, :3].isfinite().all()


def test_empty_batch(device):
    cache = paged(device, [])
    assert (
        lil_ops.score_pages(queries(device, 0, 2, 64), cache.summary, cache.page_table, cache.seq_lens, 16).shape[0]
        == 0
    )


def test_opcheck(device):
    cache = paged(device, [40, 7])
    args = (queries(device, 2, 4, 64), cache.summary.nan_to_num(), cache.page_table, cache.seq_lens, 16)
    torch.library.opcheck(torch.ops.lil.score_pages.default, args)
    torch.library.opcheck(torch.ops.lil.score_pages.default, args, {"summary_mode": "meanstd"})
    some = cache.summary.nan_to_num()[:, :, :1].repeat(1, 1, 3, 1)
    representative = (args[0], some, *args[2:])
    torch.library.opcheck(torch.ops.lil.score_pages.default, representative, {"summary_mode": "representative"})
    cache = paged(device, [40, 7], dtype=FLOAT8, scales="page")
    args = (args[0], without_nan(cache.summary), cache.page_table, cache.seq_lens, 16)
    for mode in ("minmax", "representative"):
        options = {"summary_mode": mode, "k_scale": cache.k_scale}
        torch.library.opcheck(torch.ops.lil.score_pages.default, args, options, test_utils=OPCHECKS_OF_FLOAT8)


BAD = {
    "q: expected shape": lambda a: a.update(q=a["q"][0]),
    "q: expected q_heads a multiple of kv_heads = 2, got 3": lambda a: a.update(q=a["q"][:, :3]),
    "q: expected dtype": lambda a: a.update(q=a["q"].double()),
    "summary: expected shape": lambda a: a.update(summary=a["summary"][:, :, :1]),
    "page_table: expected shape": lambda a: a.update(page_table=a["page_table"][0]),
    "page_table: expected a page": lambda a: a.update(page_table=a["page_table"] * 0 + 999),
    "page_table: expected a page from 0 to 8": lambda a: a.update(page_table=a["page_table"] * 0 - 2),
    "seq_lens: expected shape": lambda a: a.update(seq_lens=a["seq_lens"][:1]),
    "seq_lens: expected 0 to": lambda a: a.update(seq_lens=a["seq_lens"] - 50),
    "page_size: expected a page size": lambda a: a.update(page_size=24),
    "scale: expected a positive number": lambda a: a.update(scale=-1.0),
    "summary_mode: expected 'minmax', 'meanstd' or 'representative', got 'mean'": lambda a: a.update(
        summary_mode="mean"
    ),
    "summary: expected shape \\[num_pages, kv_heads, r, head_dim\\]": lambda a: a.update(
        summary=a["summary"][..., :32], summary_mode="representative"
    ),
    "summary: expected 1 to 16 representative keys, got 17": lambda a: a.update(
        summary=a["summary"][:, :, :1].repeat(1, 1, 17, 1), summary_mode="representative"
    ),
    "summary: expected 1 to 16 representative keys, got 0": lambda a: a.update(
        summary=a["summary"][:, :, :0], summary_mode="representative"
    ),
    "summary: expected its last two dimensions contiguous, got stride 128": lambda a: a.update(
        summary=a["summary"].repeat(1, 1, 2, 1)[:, :, ::2], summary_mode="representative"
    ),
    "k_scale: expected None where values are not stored as Float8": lambda a: a.update(k_scale=torch.ones(2)),
    "k_scale: expected Float, got Double": lambda a: a.update(
        summary=a["summary"].to(FLOAT8), k_scale=torch.ones(2, device=a["q"].device).double()
    ),
    "k_scale: expected shape \\[num_pages, kv_heads\\]": lambda a: a.update(
        summary=a["summary"].to(FLOAT8), k_scale=torch.ones(2, 2, device=a["q"].device)
    ),
    "k_scale: expected shape \\[kv_heads\\]": lambda a: a.update(
        summary=a["summary"].to(FLOAT8), k_scale=torch.ones(4, device=a["q"].device)
    ),
    "q: expected dtype float32, float16 or bfloat16": lambda a: a.update(q=a["q"].to(FLOAT8)),
    "summary: expected dtype float32, float16, bfloat16 or float8": lambda a: a.update(summary=a["summary"].int()),
}


@pytest.mark.parametrize("message", BAD)
def test_bad_input(device, message):
    cache = paged(device, [20, 5])
    args = dict(q=queries(device, 2, 4, 64), summary=cache.summary, page_table=cache.page_table,
                seq_lens=cache.seq_lens, page_size=16)  # fmt: skip
    BAD[message](args)
    with pytest.raises(RuntimeError, match=f"lil::score_pages: {message}"):
        lil_ops.score_pages(**args)
        lil_ops.check_errors()

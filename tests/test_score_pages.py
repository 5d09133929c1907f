import pytest
import torch
from cases import DTYPES, HEAD_DIMS, paged, queries, relative_error
from hypothesis import given, settings
from hypothesis import strategies as st

import lil_ops
from lil_ops import reference

OPERATOR = "score_pages"


def check(cache, q, page_size, **options):
    args = (q, cache.summary, cache.page_table, cache.seq_lens, page_size)
    actual, expected = lil_ops.score_pages(*args, **options), reference.score_pages(*args, **options)
    assert actual.dtype == torch.float32 and actual.shape == expected.shape
    # Scores are fp32 whatever the dtype read.
    assert relative_error(actual, expected) < 1e-5


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


def test_is_an_upper_bound_of_every_logit(device):
    cache = paged(device, [200], kv_heads=1)
    q = queries(device, 1, 3, 64)
    scores = lil_ops.score_pages(q, cache.summary, cache.page_table, cache.seq_lens, 16)[0, 0]
    for page in range(12):
        keys = cache.k[cache.page_table[0, page], 0]
        assert (keys @ q[0].T / 8).max() <= scores[page] + 1e-5


def test_unmapped_page_scores_minus_infinity(device):
    cache = paged(device, [100])
    cache.page_table[0, 3] = -1
    scores = lil_ops.score_pages(queries(device, 1, 2, 64), cache.summary, cache.page_table, cache.seq_lens, 16)
    assert scores[0, :, 3].isneginf().all() and scores[0, :, [0, 1, 2, 4, 5, 6]].isfinite().all()


def test_nan_stays_in_its_sequence(device):
    cache = paged(device, [40, 40])
    q = queries(device, 2, 2, 64)
    q[0, 0, 7] = torch.nan
    scores = lil_ops.score_pages(q, cache.summary, cache.page_table, cache.seq_lens, 16)
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
    "summary_mode: expected 'minmax'": lambda a: a.update(summary_mode="mean"),
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

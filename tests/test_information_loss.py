import math

import pytest
import torch
from cases import DTYPES, FLOAT8, PAGE_SIZES, SCALES, paged, queries, relative_error
from hypothesis import given, settings
from hypothesis import strategies as st

import lil_ops
from lil_ops import reference

OPERATORS = ["information_loss", "score_pages", "select_pages", "sparse_decode"]


def ints(values, device):
    return torch.tensor(values, dtype=torch.int32, device=device)


def check(lse, scores, seq_lens, page_size, pages, counts=None, **options):
    arguments = lse, scores, seq_lens, page_size, pages, counts
    actual = lil_ops.information_loss(*arguments, **options)
    expected = reference.information_loss(*arguments, **options)
    assert actual.dtype == torch.float32 and actual.shape == lse.shape
    # Element by element: a logarithm of 100, rounded to float32, leaves its power 8e-6 off.
    torch.testing.assert_close(actual.double(), expected, rtol=2e-5, atol=1e-30, equal_nan=True)
    return actual


def random_case(device, batch, kv_heads, group, max_pages, seed=0):
    g = torch.Generator().manual_seed(seed)
    lse, scores = (
        torch.randn(batch, kv_heads * group, generator=g) * 3,
        torch.randn(batch, kv_heads, max_pages, generator=g),
    )
    return (lse + 2).to(device), scores.to(device)


@pytest.mark.parametrize("page_size", PAGE_SIZES)
@pytest.mark.parametrize("group", [1, 3, 4, 8, 17])
def test_groups_and_pages(device, page_size, group):
    lse, scores = random_case(device, 3, 2, group, 20)
    seq_lens = ints([20 * page_size, 7 * page_size + 3, 1], device)
    pages, counts = lil_ops.select_pages(scores, seq_lens, page_size, 5 * page_size)
    loss = check(lse, scores, seq_lens, page_size, pages, counts)
    assert (loss[:2] > 0).all() and (loss[:2] < 1).all() and (loss[2] == 0).all()
    check(lse, scores, seq_lens, page_size, pages, counts, softcap=2.0)
    check(lse, scores, seq_lens, page_size, pages)


# Scores that are far apart (1e38 may be multiplied by log2(e)), or no numbers; the lse of what reads nothing, and of
# what overflowed.
SCORES = st.sampled_from([0.0, 1.5, -1.5, 88.0, -88.0, 300.0, -300.0, 1e38, -1e38, -math.inf, math.nan])
LSE = st.sampled_from([0.0, 3.0, -3.0, 88.0, -88.0, 1e4, -1e4, math.inf, -math.inf, math.nan])


@settings(max_examples=200, deadline=None)
@given(
    data=st.data(),
    page_size=st.sampled_from([8, 32]),
    max_pages=st.integers(1, 40),
    capacity=st.integers(0, 12),
    group=st.integers(1, 9),
    adversarial=st.booleans(),
    with_counts=st.booleans(),
    softcap=st.sampled_from([0.0, 5.0]),
    seed=st.integers(0, 999),
)
def test_matches_reference(
    device, data, page_size, max_pages, capacity, group, adversarial, with_counts, softcap, seed
):
    """Lists in any order, with duplicates, with -1 anywhere, and with anything past the counts."""
    batch, kv_heads = 2, 2
    lse, scores = random_case(device, batch, kv_heads, group, max_pages, seed)
    if adversarial:
        lse, scores = (
            torch.tensor(data.draw(st.lists(values, min_size=t.numel(), max_size=t.numel()))).view_as(t).to(device)
            for values, t in ((LSE, lse), (SCORES, scores))
        )
    lengths = data.draw(st.lists(st.integers(0, max_pages * page_size), min_size=batch, max_size=batch))
    g = torch.Generator().manual_seed(seed)
    pages = torch.full((batch, kv_heads, capacity), -1, dtype=torch.int32)
    for b, n in enumerate(lengths):
        if n:
            pages[b] = torch.randint(-1, -(-n // page_size), pages[b].shape, generator=g)
    counts = None
    if with_counts:
        counts = torch.randint(0, capacity + 1, (batch, kv_heads), generator=g, dtype=torch.int32)
        pages[torch.arange(capacity) >= counts[..., None]] = 12345
        counts = counts.to(device)
    check(lse, scores, ints(lengths, device), page_size, pages.to(device), counts, softcap=softcap)


@pytest.mark.parametrize("softcap", [0.0, 5.0])
@pytest.mark.parametrize("kv_dtype", [*DTYPES, FLOAT8])
@pytest.mark.parametrize("scales", SCALES)
def test_is_an_upper_bound_with_minmax_scores(device, kv_dtype, scales, softcap):
    if kv_dtype != FLOAT8 and scales:
        pytest.skip("scales are for float8")
    for seed, (page_size, group, scale) in enumerate([(8, 1, None), (16, 4, None), (32, 8, 0.02), (16, 3, 1.0)]):
        cache = paged(device, [700, 300, 17], page_size=page_size, dtype=kv_dtype, scales=scales, seed=seed)
        q = queries(device, 3, 2 * group, 64, torch.float32, seed)
        tables = cache.page_table, cache.seq_lens
        scores = lil_ops.score_pages(q, cache.summary, *tables, page_size, scale=scale, k_scale=cache.k_scale)
        options = {"scale": scale, "softcap": softcap, **cache.scales}
        _, everything = lil_ops.sparse_decode(q, cache.k, cache.v, *tables, **options)
        for budget in (page_size, 4 * page_size, 16 * page_size):
            pages, counts = lil_ops.select_pages(scores, cache.seq_lens, page_size, budget)
            _, lse = lil_ops.sparse_decode(q, cache.k, cache.v, *tables, pages, counts, **options)
            loss = check(lse, scores, cache.seq_lens, page_size, pages, counts, softcap=softcap)
            lost = -torch.expm1((lse.double() - everything.double()).clamp_max(0))
            assert (loss >= lost - 1e-5).all()


def test_is_an_estimate_with_meanstd_scores(device):
    """Near the true share for keys as the formula assumes them; the minmax bound is not."""
    lengths, page_size = [6000, 3000], 64
    errors = {}
    for mode in ("meanstd", "minmax"):
        cache = paged(device, lengths, page_size=page_size, summary_mode=mode)
        q = queries(device, 2, 2, 64)
        tables = cache.page_table, cache.seq_lens
        scores = lil_ops.score_pages(q, cache.summary, *tables, page_size, summary_mode=mode)
        pages, counts = lil_ops.select_pages(scores, cache.seq_lens, page_size, 1024)
        _, everything = lil_ops.sparse_decode(q, cache.k, cache.v, *tables)
        _, lse = lil_ops.sparse_decode(q, cache.k, cache.v, *tables, pages, counts)
        loss = check(lse, scores, cache.seq_lens, page_size, pages, counts)
        errors[mode] = (loss - (1 - (lse - everything).exp())).abs().max().item()
    assert errors["meanstd"] < 0.02 < errors["minmax"]


@pytest.mark.parametrize("softcap", [50.0, 1e3, 1e6])
def test_a_softcap_far_above_the_scores(device, softcap):
    lse, scores = random_case(device, 3, 2, 4, 20)
    pages, counts = lil_ops.select_pages(scores, ints([160, 59, 1], device), 8, 40)
    check(lse, scores, ints([160, 59, 1], device), 8, pages, counts, softcap=softcap)


@pytest.mark.parametrize("softcap", [0.0, 5.0])
def test_what_is_not_there_adds_nothing(device, softcap):
    """Every page read, no tokens, or the other pages not mapped (-inf also under a softcap)."""
    lse, scores = random_case(device, 3, 2, 2, 10)
    seq_lens = ints([75, 0, 80], device)
    pages = torch.arange(9, -1, -1, dtype=torch.int32, device=device).expand(3, 2, 10).contiguous()
    pages[1] = -1
    scores[2, :, 4:] = -torch.inf
    pages[2, :, :6] = -1  # reads 3 to 0
    assert (check(lse, scores, seq_lens, 8, pages, softcap=softcap) == 0).all()
    assert (check(torch.full_like(lse, -torch.inf), scores, seq_lens, 8, pages, softcap=softcap) == 0).all()


def test_a_head_that_reads_nothing_loses_everything(device):
    lse, scores = random_case(device, 2, 2, 3, 10)
    lse[:, :3] = -torch.inf
    pages = torch.full((2, 2, 4), -1, dtype=torch.int32, device=device)
    loss = check(lse, scores, ints([75, 3], device), 8, pages)
    assert (loss[:, :3] == 1).all() and (loss[:, 3:] < 1).all()
    empty = torch.empty(2, 2, 0, dtype=torch.int32, device=device)
    assert torch.equal(check(lse, scores, ints([75, 3], device), 8, empty), loss)


def test_what_overflows_does_not_look_like_a_small_loss(device):
    lse, scores = random_case(device, 2, 2, 2, 10)
    scores[0, 0, 5], scores[1, 1, 7] = torch.inf, torch.nan
    pages = torch.zeros((2, 2, 1), dtype=torch.int32, device=device)
    loss = lil_ops.information_loss(lse, scores, ints([80, 80], device), 8, pages)
    assert (loss[0, :2] == 1).all() and loss[1, 2:].isnan().all()
    assert (loss[0, 2:] < 1).all() and (loss[1, :2] < 1).all()
    # Read, they do not count.
    pages[0], pages[1] = 5, 7
    assert (check(lse, scores, ints([80, 80], device), 8, pages)[0, :2] < 1).all()


def test_many_pages_and_strides(device):
    lse, wide = random_case(device, 2, 1, 4, 9000)
    scores = torch.nn.functional.pad(wide, (0, 5)).expand(2, 2, 9005)[..., :9000]
    lse, seq_lens = lse.repeat(1, 2), ints([72000, 50001], device)
    pages, counts = lil_ops.select_pages(scores, seq_lens, 8, 40000)
    loss = check(lse, scores, seq_lens, 8, pages, counts)
    # The order of a list means nothing.
    shuffled = torch.nn.functional.pad(pages.flip(-1), (3, 0), value=-1)[..., 1:]
    torch.testing.assert_close(check(lse, scores, seq_lens, 8, shuffled), loss, rtol=1e-6, atol=0)


def test_a_small_loss_keeps_its_digits(device):
    lse = torch.tensor([[40.0, 20.0, 60.0]], device=device)
    loss = check(lse, torch.zeros(1, 1, 4, device=device), ints([32], device), 8, ints([[[0]]], device))
    torch.testing.assert_close(loss, 24 * torch.exp(-lse), rtol=1e-5, atol=0)


def test_empty_batch(device):
    lse, scores = random_case(device, 0, 2, 2, 4)
    check(lse, scores, ints([], device), 16, torch.empty(0, 2, 3, dtype=torch.int32, device=device))


def arguments(device):
    lse, scores = random_case(device, 2, 2, 2, 4)
    return dict(lse=lse, scores=scores, seq_lens=ints([60, 7], device), page_size=16,
                pages=torch.zeros((2, 2, 1), dtype=torch.int32, device=device),
                counts=torch.ones((2, 2), dtype=torch.int32, device=device))  # fmt: skip


def test_opcheck(device):
    args = arguments(device)
    torch.library.opcheck(torch.ops.lil.information_loss.default, tuple(args.values()), {"softcap": 5.0})
    del args["counts"]
    torch.library.opcheck(torch.ops.lil.information_loss.default, tuple(args.values()))


BAD = {
    "lse: expected shape": lambda a: a.update(lse=a["lse"][0]),
    "lse: expected Float, got Double": lambda a: a.update(lse=a["lse"].double()),
    "lse: expected a contiguous": lambda a: a.update(lse=a["lse"].T.contiguous().T),
    "lse: expected q_heads a multiple of kv_heads = 2, got 3": lambda a: a.update(lse=a["lse"][:, :3].contiguous()),
    "scores: expected shape": lambda a: a.update(scores=a["scores"][0]),
    "scores: expected Float, got Half": lambda a: a.update(scores=a["scores"].half()),
    "scores: expected a contiguous last dimension": lambda a: a.update(scores=a["scores"].mT.contiguous().mT),
    "seq_lens: expected shape": lambda a: a.update(seq_lens=a["seq_lens"][:1]),
    "seq_lens: expected Int, got Long": lambda a: a.update(seq_lens=a["seq_lens"].long()),
    "seq_lens: expected 0 to 64": lambda a: a.update(seq_lens=a["seq_lens"] + 20),
    "page_size: expected a page size": lambda a: a.update(page_size=24),
    "pages: expected shape": lambda a: a.update(pages=a["pages"][:, :1]),
    "pages: expected Int, got Long": lambda a: a.update(pages=a["pages"].long()),
    "pages: expected -1 or a page": lambda a: a.update(pages=a["pages"] - 2),
    "pages: expected -1 or a page from 0 to 3": lambda a: a["pages"][0].fill_(4),
    "pages: expected -1 or a page from 0 to 0": lambda a: a["pages"][1].fill_(1),
    "counts: expected shape": lambda a: a.update(counts=a["counts"][:1]),
    "counts: expected 0 to 1": lambda a: a.update(counts=a["counts"] + 1),
    "softcap: expected at least 0": lambda a: a.update(softcap=-1.0),
}


@pytest.mark.parametrize("message", BAD)
def test_bad_input(device, message):
    args = arguments(device)
    BAD[message](args)
    with pytest.raises(RuntimeError, match=f"lil::information_loss: {message}"):
        lil_ops.information_loss(**args)
        lil_ops.check_errors()


def test_wrong_device(device):
    if device == "cpu":
        pytest.skip("needs a second device")
    for name in ("lse", "seq_lens", "pages", "counts"):
        args = arguments(device)
        args[name] = args[name].cpu()
        with pytest.raises(RuntimeError, match=f"lil::information_loss: {name}: expected device cuda:0, got cpu"):
            lil_ops.information_loss(**args)


@pytest.mark.parametrize("dtype", DTYPES)
def test_of_operators_in_a_row(device, dtype):
    """Against the loss that float64 finds all the way."""
    cache = paged(device, [300, 40], dtype=dtype)
    q = queries(device, 2, 8, 64, dtype)
    tables = cache.page_table, cache.seq_lens
    scores = reference.score_pages(q, cache.summary, *tables, 16)
    pages, counts = reference.select_pages(scores, cache.seq_lens, 16, 96)
    _, lse = reference.sparse_decode(q, cache.k, cache.v, *tables, pages, counts)
    expected = reference.information_loss(lse, scores, cache.seq_lens, 16, pages, counts)
    scores = lil_ops.score_pages(q, cache.summary, *tables, 16)
    _, lse = lil_ops.sparse_decode(q, cache.k, cache.v, *tables, pages, counts)
    assert relative_error(lil_ops.information_loss(lse, scores, cache.seq_lens, 16, pages, counts), expected) < 1e-5

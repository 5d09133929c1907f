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
    queries,
    relative_error,
    without_nan,
)
from hypothesis import given, settings
from hypothesis import strategies as st

import lil_ops
from lil_ops import reference

OPERATORS = ["append_kv", "score_pages", "select_pages", "sparse_decode", "information_loss", "sparse_decode_step"]


def step_arguments(cache, group, dtype=torch.float32, seed=0):
    """Arguments of a step that adds each sequence's last token anew."""
    batch, kv_heads, head_dim = len(cache.seq_lens), cache.k.size(1), cache.k.size(3)
    q = queries(cache.k.device, batch, kv_heads * group, head_dim, dtype, seed)
    kv_dtype = dtype if cache.k.dtype == FLOAT8 else cache.k.dtype
    k, v = (queries(cache.k.device, batch, kv_heads, head_dim, kv_dtype, seed + i) for i in (1, 2))
    return q, k, v, cache.k, cache.v, cache.summary, cache.page_table, cache.seq_lens


def five_operators(
    q,
    k,
    v,
    k_cache,
    v_cache,
    summary,
    page_table,
    seq_lens,
    budget,
    *,
    scale=None,
    softcap=0.0,
    summary_mode="minmax",
    k_scale=None,
    v_scale=None,
    **options,
):
    page_size = k_cache.size(2)
    scales = {"k_scale": k_scale, "v_scale": v_scale}
    lil_ops.append_kv(k_cache, v_cache, summary, k, v, page_table, seq_lens, summary_mode=summary_mode, **scales)
    scores = lil_ops.score_pages(
        q, summary, page_table, seq_lens, page_size, scale=scale, summary_mode=summary_mode, k_scale=k_scale
    )
    pages, counts = lil_ops.select_pages(scores, seq_lens, page_size, budget, **options)
    attention = {"scale": scale, "softcap": softcap, **scales}
    out, lse = lil_ops.sparse_decode(q, k_cache, v_cache, page_table, seq_lens, pages, counts, **attention)
    return out, lse, lil_ops.information_loss(lse, scores, seq_lens, page_size, pages, counts, softcap=softcap)


def copies(arguments):
    q, k, v, *buffers, page_table, seq_lens = arguments
    return q, k, v, *(b.clone() for b in buffers), page_table, seq_lens


def empty_loss(q):
    """To be filled; NaN shows what is not written."""
    return q.new_full(q.shape[:2], torch.nan, dtype=torch.float32)


def check(arguments, budget, **options):
    """Equal to the operators bit for bit, buffers included, and the same with the loss asked for as without."""
    apart, losing, loss = copies(arguments), copies(arguments), empty_loss(arguments[0])
    *want, want_loss = five_operators(*apart, budget, **options)
    got = lil_ops.sparse_decode_step(*arguments, budget, **options)
    with_loss = lil_ops.sparse_decode_step(*losing, budget, loss=loss, **options)
    for a, b, c in zip((*got, *arguments[3:6]), (*want, *apart[3:6]), (*with_loss, *losing[3:6]), strict=True):
        assert_same(a, b)
        assert_same(c, b)
    # On CUDA the step adds up the masses of unread pages in another order.
    tolerance = {"rtol": 1e-5, "atol": 1e-30} if loss.is_cuda else {"rtol": 0, "atol": 0}
    torch.testing.assert_close(loss, want_loss, equal_nan=True, **tolerance)
    return got


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_head_dims(device, dtype, head_dim):
    cache = paged(device, [1000, 1, 257, 16], head_dim=head_dim, dtype=dtype)
    check(step_arguments(cache, 4, dtype), 256, sink=4, recent=20)


@pytest.mark.parametrize("page_size", PAGE_SIZES)
@pytest.mark.parametrize("group", [1, 3, 8, 12])
def test_groups_and_pages(device, page_size, group):
    cache = paged(device, [1500, 77], kv_heads=2, page_size=page_size, dtype=torch.bfloat16)
    check(step_arguments(cache, group, torch.bfloat16), 512)


@settings(max_examples=100, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 700), min_size=1, max_size=3),
    group=st.integers(1, 5),
    kv_dtype=st.sampled_from([*DTYPES, FLOAT8]),
    q_dtype=st.sampled_from(DTYPES),
    mode=st.sampled_from(["minmax", "meanstd"]),
    per_head=st.booleans(),
    nhd=st.booleans(),
    protect=st.booleans(),
    softcap=st.sampled_from([0.0, 5.0]),
    summary_dtype=st.sampled_from([None, FLOAT8]),
    seed=st.integers(0, 999),
)
def test_any(device, lengths, group, kv_dtype, q_dtype, mode, per_head, nhd, protect, softcap, summary_dtype, seed):
    scales = SCALES[seed % 3] if kv_dtype == FLOAT8 else None
    cache = paged(device, lengths, dtype=kv_dtype, per_head=per_head, nhd=nhd, seed=seed, scales=scales,
                  summary_mode=mode, summary_dtype=summary_dtype)  # fmt: skip
    protected_lens = torch.tensor([n // 3 for n in lengths], dtype=torch.int32, device=device) if protect else None
    check(
        step_arguments(cache, group, q_dtype, seed),
        128,
        sink=5,
        recent=9,
        protected_lens=protected_lens,
        scale=0.2,
        softcap=softcap,
        summary_mode=mode,
        **cache.scales,
    )


@pytest.mark.parametrize("mode", ["minmax", "meanstd"])
@pytest.mark.parametrize("scales", SCALES)
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_float8_head_dims(device, head_dim, scales, mode):
    cache = paged(device, [1000, 1, 257, 16], head_dim=head_dim, dtype=FLOAT8, scales=scales, summary_mode=mode)
    options = {"sink": 4, "recent": 20, "summary_mode": mode, **cache.scales}
    check(step_arguments(cache, 4, torch.bfloat16), 256, **options)


@pytest.mark.parametrize("mode", ["minmax", "meanstd"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_float8_summary_head_dims(device, head_dim, dtype, mode):
    cache = paged(device, [1000, 1, 257, 16], head_dim=head_dim, dtype=dtype, summary_mode=mode, summary_dtype=FLOAT8)
    check(step_arguments(cache, 4, dtype), 256, sink=4, recent=20, summary_mode=mode)


@settings(max_examples=30, deadline=None)
@given(
    length=st.integers(100, 400),
    dtype=st.sampled_from(DTYPES),
    size=st.sampled_from([0.01, 1.0, 30.0]),
    seed=st.integers(0, 999),
)
def test_float8_summaries_bound_every_logit(device, length, dtype, size, seed):
    """The scores, and with them the loss, of summaries that append_kv made."""
    cache = paged(device, [length, 50], dtype=dtype, summary_dtype=FLOAT8)
    g = torch.Generator().manual_seed(seed)
    k = (size * torch.randn(length + 50, 2, 64, generator=g)).to(device, dtype)
    cu_seqlens = torch.tensor([0, length, length + 50], dtype=torch.int32, device=device)
    tables = cache.page_table, cache.seq_lens
    lil_ops.append_kv(cache.k, cache.v, cache.summary, k, k, *tables, cu_seqlens)
    q = queries(device, 2, 4, 64, dtype, seed)
    scores = lil_ops.score_pages(q, cache.summary, *tables, 16)
    pages, counts = lil_ops.select_pages(scores, cache.seq_lens, 16, 48)
    _, lse = lil_ops.sparse_decode(q, cache.k, cache.v, *tables, pages, counts)
    loss = lil_ops.information_loss(lse, scores, cache.seq_lens, 16, pages, counts)
    for b, keys in enumerate((k[:length], k[length:])):
        logits = torch.einsum("hgd,thd->hgt", q[b].double().view(2, 2, 64), keys.double()) / 8
        highest = (
            torch.nn.functional.pad(logits.amax(1), (0, -len(keys) % 16), value=-torch.inf).view(2, -1, 16).amax(-1)
        )
        slack = 1e-5 * logits.abs().max()
        assert (scores[b, :, : highest.size(1)] >= highest - slack).all()
        read = logits.logsumexp(-1).flatten()
        assert (loss[b] >= -torch.expm1((lse[b].double() - read).clamp_max(0)) - slack).all()


@pytest.mark.parametrize("dtype", [*DTYPES, FLOAT8])
@pytest.mark.parametrize("page_size", PAGE_SIZES)
def test_meanstd_pages(device, page_size, dtype):
    cache = paged(device, [1500, 77], page_size=page_size, dtype=dtype, summary_mode="meanstd")
    arguments = step_arguments(cache, 3, torch.bfloat16 if dtype == FLOAT8 else dtype)
    check(arguments, 512, summary_mode="meanstd")


@pytest.mark.parametrize("summary_dtype", [None, FLOAT8])
@pytest.mark.parametrize("dtype", DTYPES)
def test_reference(device, dtype, summary_dtype):
    # Few pages, whose scores lie far apart: float32 and float64 choose alike.
    cache = paged(device, [300, 40], dtype=dtype, summary_dtype=summary_dtype)
    arguments = step_arguments(cache, 4, dtype)
    out, lse, *buffers, loss = reference.sparse_decode_step(*copies(arguments), 96, sink=4)
    got = *lil_ops.sparse_decode_step(*arguments, 96, sink=4, loss=(lost := empty_loss(out))), lost
    assert relative_error(got[0], out) < TOLERANCE[dtype]
    assert relative_error(got[1], lse) < 1e-5 and relative_error(got[2], loss) < 1e-5
    for a, b in zip(arguments[3:6], buffers, strict=True):
        assert_same(a, b)


def test_reference_of_float8(device):
    cache = paged(device, [300, 40], dtype=FLOAT8, scales="page")
    arguments = step_arguments(cache, 4)
    out, lse, *buffers, loss = reference.sparse_decode_step(*copies(arguments), 96, sink=4, **cache.scales)
    lost = empty_loss(out)
    got = *lil_ops.sparse_decode_step(*arguments, 96, sink=4, **cache.scales, loss=lost), lost
    assert all(relative_error(a, b) < 1e-5 for a, b in zip(got, (out, lse, loss), strict=True))
    for a, b in zip(arguments[3:6], buffers, strict=True):
        assert_same(a, b)


def test_long_sequences(device):
    """Many pages to choose from, and a selection longer than what one launch keeps at hand."""
    cache = paged(device, [40000], page_size=8, dtype=torch.bfloat16)
    for budget in (512, 34000, 48000):
        check(step_arguments(cache, 4, torch.bfloat16), budget)


@pytest.mark.parametrize("pages", [8193, 16383, 16385])
def test_many_pages(device, pages):
    """Up to 16384 pages (8192 on some GPUs) are chosen from in the attention kernel."""
    cache = paged(device, [pages * 8 - 3], kv_heads=1, page_size=8, dtype=torch.bfloat16)
    check(step_arguments(cache, 4, torch.bfloat16), 512, sink=3)


@pytest.mark.parametrize("batch, kv_heads", [(8, 2), (17, 1), (5, 3), (11, 3)])
def test_many_heads_of_long_lists(device, batch, kv_heads):
    """More of them than a device runs clusters of eight blocks at once."""
    cache = paged(device, [1600 + 50 * b for b in range(batch)], kv_heads=kv_heads, dtype=torch.bfloat16)
    check(step_arguments(cache, 6, torch.bfloat16), 1024)


def test_a_budget_of_what_is_always_read(device):
    """Nothing is chosen by its score, and the loss is that of all the rest."""
    cache = paged(device, [305, 320])
    arguments = step_arguments(cache, 2)
    assert lil_ops.sparse_decode_step(*copies(arguments), 64, sink=20, recent=17)[0].isfinite().all()
    check(arguments, 64, sink=20, recent=17)
    first_left_out = cache.page_table[0, 2]
    cache.k[first_left_out, 0, 3], cache.summary[first_left_out, 0] = torch.nan, torch.nan
    loss = empty_loss(arguments[0])
    lil_ops.sparse_decode_step(*copies(arguments), 64, sink=20, recent=17, loss=loss)
    assert loss[0, :2].isnan().all() and loss[0, 2:].isfinite().all() and loss[1].isfinite().all()


def test_a_covering_budget_is_dense_attention(device):
    cache = paged(device, [1000, 15, 512], kv_heads=3, head_dim=128, dtype=torch.bfloat16)
    arguments = step_arguments(cache, 5, torch.bfloat16)
    out, lse = lil_ops.sparse_decode_step(*arguments, 4096)
    dense = lil_ops.sparse_decode(arguments[0], *arguments[3:5], *arguments[6:])
    assert torch.equal(out, dense[0]) and torch.equal(lse, dense[1])
    loss = empty_loss(out)
    lil_ops.sparse_decode_step(*arguments, 4096, loss=loss)
    assert (loss == 0).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_pages_that_float8_cannot_bound_are_read_first(device, dtype):
    """And where they do not fit in the budget, the loss is NaN instead of a bound that is none."""
    cache = paged(device, [320, 320], dtype=dtype, summary_dtype=FLOAT8)
    large = {0: [3, 7], 1: [2, 5, 6, 9]}
    tables = cache.page_table, cache.seq_lens
    slots = torch.zeros(2, 2, dtype=torch.int32, device=device)
    for turn in range(4):
        k = torch.zeros(2, 2, 64, device=device, dtype=dtype)
        k[:, 0, 5] = 500.0
        for b, pages in large.items():
            slots[b] = pages[turn % len(pages)] * 16 + 1
        lil_ops.append_kv(cache.k, cache.v, cache.summary, k, k, *tables, slots=slots)
    arguments = step_arguments(cache, 2, dtype)
    loss = empty_loss(arguments[0])
    lil_ops.sparse_decode_step(*copies(arguments), 64, loss=loss)
    assert loss[0].isfinite().all() and loss[1, :2].isnan().all() and loss[1, 2:].isfinite().all()
    scores = lil_ops.score_pages(arguments[0], cache.summary, *tables, 16)
    assert [scores[b, 0].isnan().nonzero().flatten().tolist() for b in range(2)] == list(large.values())
    pages, _ = lil_ops.select_pages(scores, cache.seq_lens, 16, 64)
    assert {3, 7, 19} < set(pages[0, 0].tolist()) and pages[1, 0].tolist() == [2, 5, 6, 19]
    check(arguments, 64)


def test_the_loss_bounds_what_was_not_read(device):
    cache = paged(device, [1000, 300], head_dim=128, dtype=torch.bfloat16)
    arguments = step_arguments(cache, 4, torch.bfloat16)
    scale, losses = 0.01, []  # with flatter logits the bound is not near 1
    for budget in (64, 256, 800):
        loss = empty_loss(arguments[0])
        _, lse = lil_ops.sparse_decode_step(*arguments, budget, scale=scale, loss=loss)
        _, everything = lil_ops.sparse_decode(arguments[0], *arguments[3:5], *arguments[6:], scale=scale)
        assert (loss >= 1 - (lse - everything).exp() - 1e-5).all()
        losses.append(loss)
    assert (losses[0] > losses[1]).all() and (losses[1] > losses[2]).any() and (losses[2][1] == 0).all()


def test_the_loss_beside_a_page_whose_bound_is_far_off(device):
    """Its score is hundreds above the others, and its logits are not: what is unread still weighs."""
    cache = paged(device, [200, 200])
    arguments = step_arguments(cache, 2)
    q, *_, page_table, _ = arguments
    q[..., 0] = q[..., 1] = 1.0
    for b, size in enumerate([300.0, 2000.0]):
        page = page_table[b, 3]
        # Half of the keys are size * (1, -1, ...) and half -size * (1, -1, ...): q . k has none of it.
        sign = torch.ones(16, device=device)
        sign[::2] = -1
        cache.k[page, :, :, 0], cache.k[page, :, :, 1] = sign * size, -sign * size
        cache.summary[page, :, 0], cache.summary[page, :, 1] = cache.k[page].amin(1), cache.k[page].amax(1)
    loss = empty_loss(q)
    lil_ops.sparse_decode_step(*copies(arguments), 32, loss=loss)
    assert (loss > 0.5).all()
    check(arguments, 32)


def test_the_loss_is_not_known_where_all_that_is_read_is_nan(device):
    """Nothing read has a finite logit, and what is unread weighs something: that is no loss of 1."""
    arguments = step_arguments(paged(device, [33, 40]), 2)
    arguments[1][0] = torch.nan  # the newest key, alone in its page
    loss = empty_loss(arguments[0]).zero_()
    lil_ops.sparse_decode_step(*copies(arguments), 16, loss=loss)
    assert loss[0].isnan().all() and loss[1].isfinite().all()
    check(arguments, 16)


def test_a_graph_stays_right_while_lengths_grow(device):
    if device == "cpu":
        pytest.skip("CUDA graphs")
    replays = 1000
    cache = paged(device, [40 + replays, 5 + replays], head_dim=128, dtype=torch.bfloat16)
    cache.seq_lens -= replays
    eager = copies(step_arguments(cache, 4, torch.bfloat16))
    replayed = copies(eager)
    lengths, seq_lens = cache.seq_lens.clone(), cache.seq_lens.clone()
    eager, replayed = (*eager[:-1], lengths), (*replayed[:-1], seq_lens)
    loss, want_loss = empty_loss(eager[0]), empty_loss(eager[0])
    lil_ops.sparse_decode_step(*copies(replayed), 64, loss=loss)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        seq_lens.add_(1)
        result = lil_ops.sparse_decode_step(*replayed, 64, loss=loss)
    different = torch.zeros(3, dtype=torch.int32, device=device)  # read once, at the end
    for _ in range(replays):
        lengths.add_(1)
        want = lil_ops.sparse_decode_step(*eager, 64, loss=want_loss)
        graph.replay()
        for i, (a, b) in enumerate(zip((*result, loss), (*want, want_loss), strict=True)):
            different[i] += (a != b).any()
    assert different.tolist() == [0, 0, 0]
    assert seq_lens.tolist() == [40 + replays, 5 + replays] and (loss > 0).all()
    for a, b in zip(replayed[3:6], eager[3:6], strict=True):
        assert_same(a, b)


@pytest.mark.parametrize("lengths", [[0, 300, 0, 40], [0], [0, 0]])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, FLOAT8])
def test_a_sequence_of_no_tokens_takes_no_part(device, dtype, lengths):
    """Nothing of it is read or written; those beside it are as they are alone."""
    cache = paged(device, lengths, dtype=dtype)
    arguments = step_arguments(cache, 3, torch.float32 if dtype == torch.float32 else torch.bfloat16)
    still = torch.tensor([length == 0 for length in lengths], device=device)
    arguments[0][still] = torch.nan
    before = copies(arguments)
    out, lse = check(arguments, 64, sink=3)
    loss = empty_loss(out)
    lil_ops.sparse_decode_step(*copies(before), 64, sink=3, loss=loss)
    assert (out[still] == 0).all() and (lse[still] == -torch.inf).all() and (loss[still] == 0).all()
    *_, want_loss = reference.sparse_decode_step(*copies(before), 64, sink=3)
    assert (want_loss[still] == 0).all()
    others = cache.page_table[~still].flatten()
    untouched = torch.ones(len(cache.k), dtype=torch.bool, device=device)
    untouched[others[others >= 0]] = False
    for a, b in zip(arguments[3:6], before[3:6], strict=True):
        assert_same(a[untouched], b[untouched])


def test_empty_batch(device):
    out, lse = lil_ops.sparse_decode_step(*step_arguments(paged(device, []), 2), 64)
    assert out.shape == (0, 4, 64) and lse.shape == (0, 4)


def test_opcheck(device):
    cache = paged(device, [100, 7])
    q, k, v, *buffers, page_table, seq_lens = step_arguments(cache, 2)
    arguments = (q, k, v, *(b.nan_to_num() for b in buffers), page_table, seq_lens, 64)
    torch.library.opcheck(torch.ops.lil.sparse_decode_step.default, arguments, {"sink": 4})
    loss = empty_loss(q).nan_to_num()
    torch.library.opcheck(
        torch.ops.lil.sparse_decode_step.default, arguments, {"loss": loss, "summary_mode": "meanstd"}
    )
    cache = paged(device, [100, 7], dtype=FLOAT8, scales="page")
    q, k, v, *buffers, page_table, seq_lens = step_arguments(cache, 2)
    arguments = (q, k, v, *(without_nan(b) for b in buffers), page_table, seq_lens, 64)
    options = {"loss": loss, **cache.scales}
    torch.library.opcheck(torch.ops.lil.sparse_decode_step.default, arguments, options, test_utils=OPCHECKS_OF_FLOAT8)
    cache = paged(device, [100, 7], summary_dtype=FLOAT8)
    q, k, v, *buffers, page_table, seq_lens = step_arguments(cache, 2)
    arguments = (q, k, v, *(without_nan(b) for b in buffers), page_table, seq_lens, 64)
    options = {"loss": loss}
    torch.library.opcheck(torch.ops.lil.sparse_decode_step.default, arguments, options, test_utils=OPCHECKS_OF_FLOAT8)


NAMES = ["q", "k", "v", "k_cache", "v_cache", "summary", "page_table", "seq_lens"]
BAD = {
    "q: expected shape": lambda a: a.update(q=a["q"][..., :32]),
    "k: expected shape": lambda a: a.update(k=a["k"][:1]),
    "v: expected Float, got Half": lambda a: a.update(v=a["v"].half()),
    "v_cache: expected shape": lambda a: a.update(v_cache=a["v_cache"][:2]),
    "summary: expected shape": lambda a: a.update(summary=a["summary"][:, :, :1]),
    "summary: expected Float or Float8_e4m3fn, got Half": lambda a: a.update(summary=a["summary"].half()),
    "seq_lens: expected Int, got Long": lambda a: a.update(seq_lens=a["seq_lens"].long()),
    "page_table: expected shape": lambda a: a.update(page_table=a["page_table"][:1]),
    "budget: expected at least 16 tokens": lambda a: a.update(budget=15),
    "recent: expected at least 1": lambda a: a.update(recent=0),
    "scale: expected a positive number": lambda a: a.update(scale=-1.0),
    "softcap: expected": lambda a: a.update(softcap=-1.0),
    "summary_mode: expected 'minmax' or 'meanstd', got 'mean'": lambda a: a.update(summary_mode="mean"),
    "summary_mode: expected 'minmax' or 'meanstd' \\(which keys represent a page is for the policy": lambda a: a.update(
        summary_mode="representative"
    ),
    "k_scale: expected None where values are not stored as Float8": lambda a: a.update(k_scale=torch.ones(2)),
    "v_scale: expected None where values are not stored as Float8": lambda a: a.update(v_scale=torch.ones(2)),
    "k_scale: expected None where values are not stored as Float8_e4m3fn": lambda a: a.update(
        summary=a["summary"].to(FLOAT8), k_scale=torch.ones(2)
    ),
    "loss: expected Float, got Half": lambda a: a.update(loss=empty_loss(a["q"]).half()),
    "loss: expected shape \\[batch, q_heads\\]": lambda a: a.update(loss=empty_loss(a["q"])[:, :2]),
    "loss: expected a contiguous": lambda a: a.update(loss=empty_loss(a["q"]).T.contiguous().T),
}
BAD_FLOAT8 = {
    "k: expected dtype float32, float16 or bfloat16, got Float8": lambda a: a.update(k=a["k"].to(FLOAT8)),
    "v: expected Float, got Half": lambda a: a.update(v=a["v"].half()),
    "summary: expected Float8_e4m3fn, got Float": lambda a: a.update(summary=a["summary"].float()),
    "k_scale: expected shape \\[kv_heads\\]": lambda a: a.update(k_scale=torch.ones(4, device=a["q"].device)),
    "v_scale: expected shape \\[num_pages, kv_heads\\]": lambda a: a.update(
        v_scale=torch.ones(1, 2, device=a["q"].device)
    ),
    "v_scale: expected Float, got Half": lambda a: a.update(v_scale=torch.ones(2, device=a["q"].device).half()),
}


@pytest.mark.parametrize(("dtype", "message"), [(torch.float32, m) for m in BAD] + [(FLOAT8, m) for m in BAD_FLOAT8])
def test_bad_input_writes_nothing(device, dtype, message):
    arguments = dict(zip(NAMES, step_arguments(paged(device, [40, 7], dtype=dtype), 2), strict=True), budget=64)
    arguments["loss"] = torch.full((2, 4), 7.0, device=device)
    buffers = {name: arguments[name] for name in (*NAMES, "loss")}
    before = {name: value.clone() for name, value in buffers.items()}
    (BAD if dtype == torch.float32 else BAD_FLOAT8)[message](arguments)
    with pytest.raises(RuntimeError, match=f"lil::sparse_decode_step: {message}"):
        lil_ops.sparse_decode_step(**arguments)
    for name, value in buffers.items():
        assert_same(value, before[name])


def test_scales_and_loss_on_another_device(device):
    if device == "cpu":
        pytest.skip("needs a second device")
    arguments = step_arguments(paged(device, [40, 7], dtype=FLOAT8), 2)
    for name, value in (("k_scale", torch.ones(2)), ("v_scale", torch.ones(2)), ("loss", torch.ones(2, 4))):
        with pytest.raises(RuntimeError, match=f"{name}: expected device cuda:0, got cpu"):
            lil_ops.sparse_decode_step(*arguments, 64, **{name: value})


@pytest.mark.parametrize("what", ["seq_lens", "page_table"])
def test_values_out_of_range(device, what):
    arguments = dict(zip(NAMES, step_arguments(paged(device, [40, 7]), 2), strict=True), budget=64)
    before = arguments["k_cache"].clone()
    if what == "seq_lens":
        arguments["seq_lens"] = arguments["seq_lens"] + 999
    else:
        arguments["page_table"] = arguments["page_table"] * 0 + 999
    with pytest.raises(RuntimeError, match=f"{what}: expected"):
        lil_ops.sparse_decode_step(**arguments)
        lil_ops.check_errors()
    torch.testing.assert_close(arguments["k_cache"], before, rtol=0, atol=0, equal_nan=True)

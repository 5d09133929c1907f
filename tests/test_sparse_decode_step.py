import pytest
import torch
from cases import DTYPES, HEAD_DIMS, PAGE_SIZES, TOLERANCE, paged, queries, relative_error
from hypothesis import given, settings
from hypothesis import strategies as st

import lil_ops
from lil_ops import reference

OPERATOR = "sparse_decode_step"


def step_arguments(cache, group, dtype=torch.float32, seed=0):
    """Arguments of a step that adds each sequence's last token anew."""
    batch, kv_heads, head_dim = len(cache.seq_lens), cache.k.size(1), cache.k.size(3)
    q = queries(cache.k.device, batch, kv_heads * group, head_dim, dtype, seed)
    k, v = (queries(cache.k.device, batch, kv_heads, head_dim, cache.k.dtype, seed + i) for i in (1, 2))
    return q, k, v, cache.k, cache.v, cache.summary, cache.page_table, cache.seq_lens


def four_operators(
    q, k, v, k_cache, v_cache, summary, page_table, seq_lens, budget, *, scale=None, softcap=0.0, **options
):
    page_size = k_cache.size(2)
    lil_ops.append_kv(k_cache, v_cache, summary, k, v, page_table, seq_lens)
    scores = lil_ops.score_pages(q, summary, page_table, seq_lens, page_size, scale=scale)
    pages, counts = lil_ops.select_pages(scores, seq_lens, page_size, budget, **options)
    return lil_ops.sparse_decode(q, k_cache, v_cache, page_table, seq_lens, pages, counts, scale=scale, softcap=softcap)


def copies(arguments):
    q, k, v, *buffers, page_table, seq_lens = arguments
    return q, k, v, *(b.clone() for b in buffers), page_table, seq_lens


def check(arguments, budget, **options):
    """Equal to the four operators bit for bit, buffers included."""
    apart = copies(arguments)
    want = four_operators(*apart, budget, **options)
    got = lil_ops.sparse_decode_step(*arguments, budget, **options)
    for a, b in zip((*got, *arguments[3:6]), (*want, *apart[3:6]), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)
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


@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 700), min_size=1, max_size=3),
    group=st.integers(1, 5),
    kv_dtype=st.sampled_from(DTYPES),
    q_dtype=st.sampled_from(DTYPES),
    per_head=st.booleans(),
    nhd=st.booleans(),
    protect=st.booleans(),
    softcap=st.sampled_from([0.0, 5.0]),
    seed=st.integers(0, 999),
)
def test_any(device, lengths, group, kv_dtype, q_dtype, per_head, nhd, protect, softcap, seed):
    cache = paged(device, lengths, dtype=kv_dtype, per_head=per_head, nhd=nhd, seed=seed)
    protected_lens = torch.tensor([n // 3 for n in lengths], dtype=torch.int32, device=device) if protect else None
    check(
        step_arguments(cache, group, q_dtype, seed),
        128,
        sink=5,
        recent=9,
        protected_lens=protected_lens,
        scale=0.2,
        softcap=softcap,
    )


@pytest.mark.parametrize("dtype", DTYPES)
def test_reference(device, dtype):
    # Few pages, whose scores lie far apart: float32 and float64 choose alike.
    cache = paged(device, [300, 40], dtype=dtype)
    arguments = step_arguments(cache, 4, dtype)
    out, lse, *buffers = reference.sparse_decode_step(*copies(arguments), 96, sink=4)
    got = lil_ops.sparse_decode_step(*arguments, 96, sink=4)
    assert relative_error(got[0], out) < TOLERANCE[dtype] and relative_error(got[1], lse) < 1e-5
    for a, b in zip(arguments[3:6], buffers, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)


def test_long_sequences(device):
    """Many pages to choose from, and a selection longer than what one launch keeps at hand."""
    cache = paged(device, [40000], page_size=8, dtype=torch.bfloat16)
    for budget in (512, 34000, 48000):
        check(step_arguments(cache, 4, torch.bfloat16), budget)


def test_a_covering_budget_is_dense_attention(device):
    cache = paged(device, [1000, 15, 512], kv_heads=3, head_dim=128, dtype=torch.bfloat16)
    arguments = step_arguments(cache, 5, torch.bfloat16)
    out, lse = lil_ops.sparse_decode_step(*arguments, 4096)
    dense = lil_ops.sparse_decode(arguments[0], *arguments[3:5], *arguments[6:])
    assert torch.equal(out, dense[0]) and torch.equal(lse, dense[1])


def test_a_graph_stays_right_while_lengths_grow(device):
    if device == "cpu":
        pytest.skip("CUDA graphs")
    cache = paged(device, [600, 90], head_dim=128, dtype=torch.bfloat16)
    cache.seq_lens -= torch.tensor([560, 85], dtype=torch.int32, device=device)
    eager = copies(step_arguments(cache, 4, torch.bfloat16))
    replayed = copies(eager)
    lengths, seq_lens = cache.seq_lens.clone(), cache.seq_lens.clone()
    eager, replayed = (*eager[:-1], lengths), (*replayed[:-1], seq_lens)
    lil_ops.sparse_decode_step(*copies(replayed), 64)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        seq_lens.add_(1)
        result = lil_ops.sparse_decode_step(*replayed, 64)
    for _ in range(80):
        lengths.add_(1)
        want = lil_ops.sparse_decode_step(*eager, 64)
        graph.replay()
        assert torch.equal(result[0], want[0]) and torch.equal(result[1], want[1])


def test_empty_batch(device):
    out, lse = lil_ops.sparse_decode_step(*step_arguments(paged(device, []), 2), 64)
    assert out.shape == (0, 4, 64) and lse.shape == (0, 4)


def test_opcheck(device):
    cache = paged(device, [100, 7])
    q, k, v, *buffers, page_table, seq_lens = step_arguments(cache, 2)
    arguments = (q, k, v, *(b.nan_to_num() for b in buffers), page_table, seq_lens, 64)
    torch.library.opcheck(torch.ops.lil.sparse_decode_step.default, arguments, {"sink": 4})


NAMES = ["q", "k", "v", "k_cache", "v_cache", "summary", "page_table", "seq_lens"]
BAD = {
    "q: expected shape": lambda a: a.update(q=a["q"][..., :32]),
    "k: expected shape": lambda a: a.update(k=a["k"][:1]),
    "v: expected Float, got Half": lambda a: a.update(v=a["v"].half()),
    "v_cache: expected shape": lambda a: a.update(v_cache=a["v_cache"][:2]),
    "summary: expected shape": lambda a: a.update(summary=a["summary"][:, :, :1]),
    "seq_lens: expected Int, got Long": lambda a: a.update(seq_lens=a["seq_lens"].long()),
    "page_table: expected shape": lambda a: a.update(page_table=a["page_table"][:1]),
    "budget: expected at least 16 tokens": lambda a: a.update(budget=15),
    "recent: expected at least 1": lambda a: a.update(recent=0),
    "scale: expected a positive number": lambda a: a.update(scale=-1.0),
    "softcap: expected": lambda a: a.update(softcap=-1.0),
    "summary_mode: expected 'minmax'": lambda a: a.update(summary_mode="mean"),
}


@pytest.mark.parametrize("message", BAD)
def test_bad_input_writes_nothing(device, message):
    arguments = dict(zip(NAMES, step_arguments(paged(device, [40, 7]), 2), strict=True), budget=64)
    before = {name: value.clone() for name, value in arguments.items() if name in NAMES}
    buffers = {name: arguments[name] for name in NAMES}
    BAD[message](arguments)
    with pytest.raises(RuntimeError, match=f"lil::sparse_decode_step: {message}"):
        lil_ops.sparse_decode_step(**arguments)
    for name, value in buffers.items():
        torch.testing.assert_close(value, before[name], rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("what", ["seq_lens", "page_table"])
def test_values_out_of_range(device, what):
    arguments = dict(zip(NAMES, step_arguments(paged(device, [40, 7]), 2), strict=True), budget=64)
    before = arguments["k_cache"].clone()
    if what == "seq_lens":
        arguments["seq_lens"] = arguments["seq_lens"] * 0
    else:
        arguments["page_table"] = arguments["page_table"] * 0 + 999
    with pytest.raises(RuntimeError, match=f"{what}: expected"):
        lil_ops.sparse_decode_step(**arguments)
        lil_ops.check_errors()
    torch.testing.assert_close(arguments["k_cache"], before, rtol=0, atol=0, equal_nan=True)

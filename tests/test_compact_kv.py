import pytest
import torch
from cases import DTYPES, FLOAT8, HEAD_DIMS, OPCHECKS_OF_FLOAT8, PAGE_SIZES, assert_same, paged
from hypothesis import given, settings
from hypothesis import strategies as st

import lil_ops
from lil_ops import reference

OPERATOR = "compact_kv"


def ints(values, device):
    return torch.tensor(values, dtype=torch.int32, device=device)


def random_keep(cache, counts, capacity, seed=0):
    """Each head's own choice of the slots in use; what must not be looked at behind the counts."""
    g = torch.Generator().manual_seed(seed)
    kv_heads = cache.k.size(1)
    keep = torch.full((len(counts), kv_heads, capacity), 1 << 30, dtype=torch.int32)
    for b, (n, count) in enumerate(zip(cache.seq_lens.tolist(), counts, strict=True)):
        for h in range(kv_heads):
            keep[b, h, :count] = torch.randperm(n, generator=g)[:count].sort().values
    return keep.to(cache.k.device)


def check(cache, keep, counts):
    """The reference's bits, in the whole of both buffers."""
    want = reference.compact_kv(cache.k, cache.v, cache.page_table, keep, counts)
    lil_ops.compact_kv(cache.k, cache.v, cache.page_table, keep, counts)
    lil_ops.check_errors()
    for a, b in zip((cache.k, cache.v), want, strict=True):
        assert_same(a, b)


@pytest.mark.parametrize("dtype", [*DTYPES, FLOAT8])
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("nhd", [False, True])
def test_dtypes_and_head_dims(device, dtype, head_dim, nhd):
    cache = paged(device, [300, 7, 40], kv_heads=3, head_dim=head_dim, dtype=dtype, nhd=nhd)
    counts = [250, 7, 1]
    check(cache, random_keep(cache, counts, 260), ints(counts, device))


@settings(max_examples=60, deadline=None)
@given(
    data=st.data(),
    lengths=st.lists(st.integers(0, 150), min_size=1, max_size=3),
    page_size=st.sampled_from(PAGE_SIZES),
    dtype=st.sampled_from([*DTYPES, FLOAT8]),
    per_head=st.booleans(),
    nhd=st.booleans(),
    extra=st.integers(0, 3),
    seed=st.integers(0, 999),
)
def test_matches_reference(device, data, lengths, page_size, dtype, per_head, nhd, extra, seed):
    cache = paged(device, lengths, head_dim=80, page_size=page_size, dtype=dtype, per_head=per_head, nhd=nhd, seed=seed)
    counts = [data.draw(st.integers(0, n)) for n in lengths]
    check(cache, random_keep(cache, counts, max(counts) + extra, seed), ints(counts, device))


def test_a_long_sequence_moves_by_one(device):
    """Every slot is both read and written: each must be read first."""
    n = 4000
    cache = paged(device, [n], kv_heads=2, head_dim=128, dtype=torch.bfloat16)
    keep = torch.arange(1, n, dtype=torch.int32, device=device).expand(1, 2, n - 1)
    check(cache, keep, ints([n - 1], device))


def test_what_is_kept_is_what_attention_reads(device):
    if device != "cpu":
        pytest.skip("one device is enough for the operators in a row")
    cache = paged(device, [90])
    keep = random_keep(cache, [33], 33)
    k, v = (t[cache.page_table[0, :6].long()].transpose(0, 1).reshape(2, 96, 64).clone() for t in (cache.k, cache.v))
    lil_ops.compact_kv(cache.k, cache.v, cache.page_table, keep, ints([33], device))
    q = torch.randn(1, 2, 64)
    out, _ = lil_ops.sparse_decode(q, cache.k, cache.v, cache.page_table, ints([33], device))
    for h in range(2):
        slots = keep[0, h].long()
        weights = (k[h, slots] @ q[0, h] * 64**-0.5).softmax(0)
        torch.testing.assert_close(out[0, h], weights @ v[h, slots], rtol=1e-4, atol=1e-5)


def test_nothing_to_move(device):
    cache = paged(device, [40, 20])
    for keep, counts in (
        (torch.full((2, 2, 5), -7, dtype=torch.int32, device=device), [0, 0]),
        (torch.arange(20, dtype=torch.int32, device=device).expand(2, 2, 20), [20, 3]),
        (torch.empty(2, 2, 0, dtype=torch.int32, device=device), [0, 0]),
    ):
        before = cache.k.clone(), cache.v.clone()
        check(cache, keep, ints(counts, device))
        assert_same(cache.k, before[0]), assert_same(cache.v, before[1])


def test_empty_batch(device):
    cache = paged(device, [40])
    nothing = torch.empty(0, 2, 3, dtype=torch.int32, device=device)
    before = cache.k.clone(), cache.v.clone()
    assert lil_ops.compact_kv(cache.k, cache.v, cache.page_table[:0], nothing, ints([], device)) is None
    assert_same(cache.k, before[0]), assert_same(cache.v, before[1])


def arguments(device, dtype=torch.float32):
    cache = paged(device, [60, 20], dtype=dtype)
    counts = [11, 12]
    keep = random_keep(cache, counts, 12)
    keep[0, :, 11] = 59
    return dict(k_cache=cache.k, v_cache=cache.v, page_table=cache.page_table, keep=keep, counts=ints(counts, device))


@pytest.mark.parametrize("dtype", [torch.bfloat16, FLOAT8])
def test_opcheck(device, dtype):
    args = arguments(device, dtype)
    for name in ("k_cache", "v_cache"):
        args[name] = args[name].nan_to_num() if dtype != FLOAT8 else args[name]
    tests = {"test_utils": OPCHECKS_OF_FLOAT8} if dtype == FLOAT8 else {}
    torch.library.opcheck(torch.ops.lil.compact_kv.default, tuple(args.values()), **tests)


def put(name, index, value):
    return lambda a: a[name].__setitem__(index, value)


BAD = {
    "k_cache: expected shape": lambda a: a.update(k_cache=a["k_cache"][0]),
    "v_cache: expected Float, got Half": lambda a: a.update(v_cache=a["v_cache"].half()),
    "page_table: expected shape": lambda a: a.update(page_table=a["page_table"][:1]),
    "keep: expected shape": lambda a: a.update(keep=a["keep"][:, :1]),
    "keep: expected Int, got Long": lambda a: a.update(keep=a["keep"].long()),
    "keep: expected a contiguous last dimension": lambda a: a.update(keep=a["keep"].mT.contiguous().mT),
    "counts: expected shape": lambda a: a.update(counts=a["counts"][:1]),
    "counts: expected Int, got Long": lambda a: a.update(counts=a["counts"].long()),
    "counts: expected 0 to 12 slots": put("counts", 1, 13),
    "counts: expected 0 to 12 slots for sequence 0, got -1": put("counts", 0, -1),
    "keep: expected ascending slots below 80": put("keep", (0, 1, 10), 80),
    "keep: expected ascending slots below 80 for sequence 0.*got -1": put("keep", (0, slice(None), 0), -1),
    "keep: expected ascending": lambda a: a.update(keep=a["keep"].flip(-1)),
    "page_table: expected a page": put("page_table", (0, 0), -1),
    "page_table: expected a page from 0 to 12": put("page_table", (0, 0), 13),
}


@pytest.mark.parametrize("message", BAD)
def test_bad_input(device, message):
    """On the CPU nothing is written, on CUDA nothing of that head."""
    args = arguments(device)
    BAD[message](args)
    before = args["k_cache"].clone(), args["v_cache"].clone()
    with pytest.raises(RuntimeError, match=f"lil::compact_kv: {message}"):
        lil_ops.compact_kv(**args)
        lil_ops.check_errors()
    if device == "cpu":
        assert_same(args["k_cache"], before[0]), assert_same(args["v_cache"], before[1])


def test_a_bad_head_is_left_alone(device):
    if device == "cpu":
        pytest.skip("the CPU raises before anything is written")
    args = arguments(device)
    right = {**args, "keep": args["keep"].clone()}
    right["keep"][0, 1] = torch.arange(12)
    want = reference.compact_kv(**right)
    args["keep"][0, 1, 6] = args["keep"][0, 1, 5]
    lil_ops.compact_kv(**args)
    with pytest.raises(RuntimeError, match="keep: expected ascending"):
        lil_ops.check_errors()
    assert_same(args["k_cache"], want[0]), assert_same(args["v_cache"], want[1])


def test_wrong_device(device):
    if device == "cpu":
        pytest.skip("needs a second device")
    for name in ("v_cache", "page_table", "keep", "counts"):
        args = arguments(device)
        args[name] = args[name].cpu()
        with pytest.raises(RuntimeError, match=f"lil::compact_kv: {name}: expected device cuda:0, got cpu"):
            lil_ops.compact_kv(**args)


def test_compiled_equals_eager(device):
    """The kept slots are found in the same graph; counts change without another."""
    eager, compiled = arguments(device), arguments(device)

    def step(k_cache, v_cache, page_table, scores, counts):
        keep = scores.topk(12, sorted=False).indices.sort().values.int()
        lil_ops.compact_kv(k_cache, v_cache, page_table, keep, counts)
        return k_cache[page_table[:, 0].long()] * 2

    run = torch.compile(step, fullgraph=True, dynamic=False)
    torch._dynamo.utils.counters.clear()
    for counts in ([11, 12], [3, 0]):
        scores = torch.randn(2, 2, 20, generator=torch.Generator().manual_seed(counts[0])).to(device)
        tail = scores, ints(counts, device)
        a, b = (f(*list(args.values())[:3], *tail) for f, args in ((step, eager), (run, compiled)))
        assert_same(a, b)
        assert_same(eager["k_cache"], compiled["k_cache"]), assert_same(eager["v_cache"], compiled["v_cache"])
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1

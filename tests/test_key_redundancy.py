import pytest
import torch
from cases import DTYPES, FLOAT8, HEAD_DIMS, OPCHECKS_OF_FLOAT8, PAGE_SIZES, paged
from hypothesis import example, given, settings
from hypothesis import strategies as st

import lil_ops
from lil_ops import reference
from lil_ops.reference.key_redundancy import cosines

OPERATOR = "key_redundancy"


def ints(values, device):
    return torch.tensor(values, dtype=torch.int32, device=device)


def clustered(device, lengths, *, centres=5, spread=0.7, seed=0, **options):
    """A cache whose keys lie around a few centres, and so many cosines on either side of a half."""
    cache = paged(device, lengths, seed=seed, **options)
    g = torch.Generator().manual_seed(seed)
    wide = cache.k.float().cpu()
    around = torch.randn(centres, wide.size(-1), generator=g)
    keys = around[torch.randint(centres, wide.shape[:-1], generator=g)] + spread * wide
    cache.k.copy_(keys.to(cache.k.dtype))
    return cache


def clear_threshold(cache, near=0.5):
    """Where no cosine is near: what float32 and float64 take for similar must not differ."""
    near_ones = [torch.tensor([near - 0.05, near + 0.05], dtype=torch.float64)]
    for b, n in enumerate(cache.seq_lens.tolist()):
        for h in range(cache.k.size(1)):
            cosine = cosines(cache.k, cache.page_table, b, h, n).flatten().cpu()
            near_ones.append(cosine[(cosine - near).abs() < 0.05])
    ordered = torch.cat(near_ones).sort().values
    at = ordered.diff().argmax()
    assert ordered.diff()[at] > 4e-6
    return ordered[at : at + 2].mean().item()


def check(cache, **options):
    tables = cache.k, cache.page_table, cache.seq_lens
    actual = lil_ops.key_redundancy(*tables, **options)
    lil_ops.check_errors()
    expected = reference.key_redundancy(*tables, **options)
    assert actual.dtype == torch.float32 and actual.shape == expected.shape
    # A difference of sums of cosines, which may be nothing: the norm counts as that of tenths at least.
    norm = max(expected.norm().item(), 0.1 * (int(cache.seq_lens.sum()) * expected.size(1)) ** 0.5)
    assert (actual - expected).norm().item() <= 1e-5 * norm
    for b, n in enumerate(cache.seq_lens.tolist()):
        assert (actual[b, :, n:] == 0).all()
    return actual


def random_positions(cache, capacity, seed=0):
    """Different ones in each head, in no order; what must not be looked at behind the length."""
    g = torch.Generator().manual_seed(seed)
    kv_heads, lengths = cache.k.size(1), cache.seq_lens.tolist()
    positions = torch.full((len(lengths), kv_heads, capacity), -1, dtype=torch.int32)
    for b, n in enumerate(lengths):
        for h in range(kv_heads):
            positions[b, h, :n] = torch.randperm(3 * n + 1, generator=g)[:n]
    return positions.to(cache.k.device)


@pytest.mark.parametrize("dtype", [*DTYPES, FLOAT8])
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_dtypes_and_head_dims(device, dtype, head_dim):
    cache = clustered(device, [200, 64, 1], head_dim=head_dim, dtype=dtype)
    check(cache, threshold=clear_threshold(cache))


@settings(max_examples=50, deadline=None)
@example(
    lengths=[2],
    page_size=8,
    kv_heads=1,
    dtype=torch.float32,
    per_head=False,
    nhd=False,
    centres=1,
    near=0.5,
    with_positions=False,
    seed=4,
)  # each key drops the other: nothing is left
@given(
    lengths=st.lists(st.integers(0, 150), min_size=1, max_size=3),
    page_size=st.sampled_from(PAGE_SIZES),
    kv_heads=st.integers(1, 3),
    dtype=st.sampled_from([*DTYPES, FLOAT8]),
    per_head=st.booleans(),
    nhd=st.booleans(),
    centres=st.integers(1, 40),
    near=st.sampled_from([0.5, 0.0, 0.8]),
    with_positions=st.booleans(),
    seed=st.integers(0, 999),
)
def test_matches_reference(
    device, lengths, page_size, kv_heads, dtype, per_head, nhd, centres, near, with_positions, seed
):
    cache = clustered(device, lengths, kv_heads=kv_heads, page_size=page_size, dtype=dtype, per_head=per_head, nhd=nhd,
                      centres=centres, seed=seed)  # fmt: skip
    positions = random_positions(cache, max(lengths) + seed % 3, seed) if with_positions else None
    check(cache, threshold=clear_threshold(cache, near), positions=positions)


@pytest.mark.parametrize("threshold", [1.0, -1.0])
def test_nothing_is_similar_or_everything(device, threshold):
    check(clustered(device, [130, 33]), threshold=threshold)


def test_is_what_the_published_code_computes(device):
    """Its steps on the whole matrix: column numbers where similar, or else 0; the largest of each row is put to 0."""
    cache = clustered(device, [150], centres=100)
    threshold, n = clear_threshold(cache), 150
    actual = check(cache, threshold=threshold)
    for h in range(2):
        cosine = cosines(cache.k, cache.page_table, 0, h, n)
        last = ((cosine > threshold) * torch.arange(n, device=device)).amax(-1, keepdim=True)
        assert 0 < (cosine > threshold).any(-1).sum() < n  # both kinds of rows are there
        torch.testing.assert_close(actual[0, h, :n].double(), cosine.scatter(-1, last, 0).mean(0), rtol=0, atol=1e-6)


def test_the_latest_of_a_group_is_not_redundant(device):
    """Three equal keys among others at right angles: the two earlier ones show, and which they are is a matter of
    positions."""
    cache = paged(device, [6], kv_heads=1)
    keys = torch.eye(64, device=device)[[0, 1, 0, 2, 0, 3]]
    page = int(cache.page_table[0, 0])
    cache.k[page, 0, :6] = keys * torch.tensor([[1.0], [2.0], [3.0], [4.0], [0.5], [6.0]], device=device)
    # Of the row of the latest, the middle one is the latest similar.
    assert torch.equal(check(cache)[0, 0, :6] * 6, torch.tensor([2.0, 0, 1, 0, 0, 0], device=device))
    positions = ints([[[9, 8, 1, 2, 0, 4]]], device)
    assert torch.equal(
        check(cache, positions=positions)[0, 0, :6] * 6, torch.tensor([0, 0, 1.0, 0, 2, 0], device=device)
    )


def test_keys_of_zeros_are_like_none(device):
    cache = paged(device, [40], kv_heads=1)
    cache.k[int(cache.page_table[0, 0]), 0, 3:5] = 0
    redundancy = check(cache)
    assert (redundancy[0, 0, 3:5] == 0).all()


def test_nan_stays_in_its_head(device):
    cache = clustered(device, [70, 50])
    want = lil_ops.key_redundancy(cache.k, cache.page_table, cache.seq_lens)
    cache.k[int(cache.page_table[0, 1]), 1, 3, 5] = torch.nan
    got = lil_ops.key_redundancy(cache.k, cache.page_table, cache.seq_lens)
    assert got[0, 1, :70].isnan().sum() >= 69
    assert torch.equal(got[0, 0], want[0, 0]) and torch.equal(got[1], want[1])


def test_many_keys_give_the_same_bits_again(device):
    cache = clustered(device, [2500, 1000], head_dim=128, dtype=torch.bfloat16)
    arguments = cache.k, cache.page_table, cache.seq_lens
    first = lil_ops.key_redundancy(*arguments)
    assert all(torch.equal(lil_ops.key_redundancy(*arguments), first) for _ in range(3))
    assert torch.equal(lil_ops.key_redundancy(cache.k, cache.page_table[1:], cache.seq_lens[1:]), first[1:])


def test_empty_cases(device):
    cache = paged(device, [0, 0])
    slots = check(cache).size(-1)
    assert lil_ops.key_redundancy(cache.k, cache.page_table[:0], cache.seq_lens[:0]).shape == (0, 2, slots)
    assert lil_ops.key_redundancy(cache.k, cache.page_table[:, :0], cache.seq_lens).shape == (2, 2, 0)


def arguments(device, dtype=torch.float32):
    cache = clustered(device, [60, 20], dtype=dtype)
    return dict(k_cache=cache.k, page_table=cache.page_table, seq_lens=cache.seq_lens, threshold=0.5,
                positions=random_positions(cache, 70))  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.bfloat16, FLOAT8])
def test_opcheck(device, dtype):
    args = arguments(device, dtype)
    tests = {"test_utils": OPCHECKS_OF_FLOAT8} if dtype == FLOAT8 else {}
    required = tuple(args.pop(name) for name in ("k_cache", "page_table", "seq_lens"))
    torch.library.opcheck(torch.ops.lil.key_redundancy.default, required, args, **tests)
    torch.library.opcheck(torch.ops.lil.key_redundancy.default, required, **tests)


BAD = {
    "k_cache: expected shape": lambda a: a.update(k_cache=a["k_cache"][0]),
    "k_cache: expected dtype float32": lambda a: a.update(k_cache=a["k_cache"].double()),
    "page_table: expected shape": lambda a: a.update(page_table=a["page_table"][:1]),
    "seq_lens: expected Int, got Long": lambda a: a.update(seq_lens=a["seq_lens"].long()),
    "threshold: expected a cosine": lambda a: a.update(threshold=1.5),
    "threshold: expected a cosine, -1 to 1, got nan": lambda a: a.update(threshold=float("nan")),
    "positions: expected shape": lambda a: a.update(positions=a["positions"][:, :1]),
    "positions: expected Int, got Long": lambda a: a.update(positions=a["positions"].long()),
    "positions: expected a contiguous last": lambda a: a.update(positions=a["positions"].mT.contiguous().mT),
    "positions: expected a capacity of at least 60": lambda a: a.update(positions=a["positions"][..., :59]),
    "positions: expected at least 0": lambda a: a["positions"][1, 1, 19].fill_(-1),
    "seq_lens: expected 0 to 80": lambda a: a.update(seq_lens=a["seq_lens"] + 30),
    "seq_lens: expected 0 to 80 .*got -1": lambda a: a["seq_lens"][0].fill_(-1),
    "page_table: expected a page": lambda a: a["page_table"][1, 1].fill_(-1),
    "page_table: expected a page from 0 to 12": lambda a: a["page_table"][1, 1].fill_(13),
}


@pytest.mark.parametrize("message", BAD)
def test_bad_input(device, message):
    args = arguments(device)
    BAD[message](args)
    if message.startswith("seq_lens: expected 0"):
        args["positions"] = None
    with pytest.raises(RuntimeError, match=f"lil::key_redundancy: {message}"):
        lil_ops.key_redundancy(**args)
        lil_ops.check_errors()


def test_wrong_device(device):
    if device == "cpu":
        pytest.skip("needs a second device")
    for name in ("page_table", "seq_lens", "positions"):
        args = arguments(device)
        args[name] = args[name].cpu()
        with pytest.raises(RuntimeError, match=f"lil::key_redundancy: {name}: expected device cuda:0, got cpu"):
            lil_ops.key_redundancy(**args)


def test_compiled_equals_eager(device):
    """With the softmax that R-KV takes of it; lengths change without another graph."""
    args = arguments(device)

    def step(k_cache, page_table, seq_lens, threshold, positions):
        redundancy = lil_ops.key_redundancy(k_cache, page_table, seq_lens, threshold=threshold, positions=positions)
        slots = torch.arange(redundancy.size(-1), device=redundancy.device)
        return redundancy.masked_fill(slots >= seq_lens[:, None, None], -torch.inf).softmax(-1)

    run = torch.compile(step, fullgraph=True, dynamic=False)
    torch._dynamo.utils.counters.clear()
    for lengths in ([60, 20], [33, 1]):
        args["seq_lens"] = ints(lengths, device)
        torch.testing.assert_close(run(**args), step(**args))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1

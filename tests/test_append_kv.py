import pytest
import torch
from cases import DTYPES, PAGE_SIZES, paged
from hypothesis import given, settings
from hypothesis import strategies as st

import lil_ops
from lil_ops import reference

OPERATOR = "append_kv"


def new_tokens(count, cache, seed=3):
    g = torch.Generator().manual_seed(seed)
    shape = (count, cache.k.size(1), cache.k.size(3))
    return [torch.randn(shape, generator=g).to(cache.k) for _ in range(2)]


def check(cache, k, v, cu_seqlens=None, summary=True):
    before = [cache.k.clone(), cache.v.clone(), cache.summary.clone() if summary else None]
    expected = reference.append_kv(*before, k, v, cache.page_table, cache.seq_lens, cu_seqlens)
    target = cache.summary if summary else None
    lil_ops.append_kv(cache.k, cache.v, target, k, v, cache.page_table, cache.seq_lens, cu_seqlens)
    for actual, want in zip([cache.k, cache.v, target], expected, strict=True):
        if want is not None:
            torch.testing.assert_close(actual, want, rtol=0, atol=0, equal_nan=True)


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


def test_strided_tokens(device):
    cache = paged(device, [20, 5])
    k, v = (
        torch.randn(2, 2, 64, device=device).transpose(0, 1) for _ in range(2)
    )  # as [kv_heads, tokens, head_dim] viewed
    check(cache, k, v)


def test_overwriting_a_token_renews_the_summary(device):
    cache = paged(device, [16])
    cache.k[cache.page_table[0, 0], :, 15] = 100.0
    lil_ops.append_kv(cache.k, cache.v, cache.summary, *new_tokens(1, cache), cache.page_table, cache.seq_lens)
    assert cache.summary[cache.page_table[0, 0]].max() < 100


def test_nan_key_stays_in_its_summary(device):
    cache = paged(device, [16, 16])
    k, v = new_tokens(2, cache)
    k[0, 0, 5] = torch.nan
    lil_ops.append_kv(cache.k, cache.v, cache.summary, k, v, cache.page_table, cache.seq_lens)
    first, second = cache.page_table[:, 0]
    assert cache.summary[first, 0, :, 5].isnan().all()
    assert cache.summary[first].isnan().sum() == 2 and not cache.summary[second].isnan().any()


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
        torch.library.opcheck(torch.ops.lil.append_kv.default, args)


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
    "k: expected shape": lambda a: a.update(k=a["k"][:, :, :32]),
    "k: expected Float, got Half": lambda a: a.update(k=a["k"].half()),
    "v: expected shape": lambda a: a.update(v=a["v"][:1]),
    "page_table: expected Int": lambda a: a.update(page_table=a["page_table"].long()),
    "page_table: expected shape": lambda a: a.update(page_table=a["page_table"][:1]),
    "seq_lens: expected Int": lambda a: a.update(seq_lens=a["seq_lens"].long()),
    "seq_lens: expected 0 to": lambda a: a.update(seq_lens=a["seq_lens"].new_tensor([20, 1000])),
    "seq_lens: expected at least the 1 tokens": lambda a: a.update(seq_lens=a["seq_lens"].new_tensor([20, 0])),
    "page_table: expected a page from 0": lambda a: a.update(page_table=a["page_table"] * 0 - 1),
    "page_table: expected a page from 0 to": lambda a: a.update(page_table=a["page_table"] * 0 + 1000),
    "cu_seqlens: expected ascending": lambda a: a.update(cu_seqlens=a["seq_lens"].new_tensor([0, 2, 1])),
    "summary_mode: expected 'minmax', got 'max'": lambda a: a.update(summary_mode="max"),
}


SEEN_ON_THE_DEVICE = [m for m in BAD if "from 0" in m or "0 to" in m or "at least the" in m or "ascending" in m]


@pytest.mark.parametrize("message", BAD)
def test_bad_input_writes_nothing(device, message):
    """On CUDA what only the device sees is skipped, and told by check_errors; other sequences are written."""
    cache = paged(device, [20, 5])
    k, v = new_tokens(2, cache)
    args = dict(k_cache=cache.k, v_cache=cache.v, summary=cache.summary, k=k, v=v, page_table=cache.page_table,
                seq_lens=cache.seq_lens)  # fmt: skip
    BAD[message](args)
    before = [t.clone() for t in (cache.k, cache.v, cache.summary)]
    with pytest.raises(RuntimeError, match=f"lil::append_kv: {message}"):
        lil_ops.append_kv(**args)
        lil_ops.check_errors()
    if device == "cuda" and message in SEEN_ON_THE_DEVICE:
        return
    for now, then in zip((cache.k, cache.v, cache.summary), before, strict=True):
        torch.testing.assert_close(now, then, rtol=0, atol=0, equal_nan=True)

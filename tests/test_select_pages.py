import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import lil_ops
from lil_ops import reference

OPERATOR = "select_pages"


def check(scores, lengths, page_size, budget, **options):
    seq_lens = torch.tensor(lengths, dtype=torch.int32, device=scores.device)
    actual = lil_ops.select_pages(scores, seq_lens, page_size, budget, **options)
    expected = reference.select_pages(scores, seq_lens, page_size, budget, **options)
    for a, e in zip(actual, expected, strict=True):
        assert a.dtype == torch.int32 and torch.equal(a, e)
    return actual


# Few distinct values make ties; the extremes are what bisection over float bits could get wrong.
SCORES = st.sampled_from(
    [0.0, -0.0, 1.0, 1.0000001, -1.0, 1e-42, 3e38, -3e38, float("inf"), float("-inf"), float("nan")]
)


@settings(max_examples=150, deadline=None)
@given(data=st.data(), page_size=st.sampled_from([8, 16]), pages=st.integers(1, 24), adversarial=st.booleans())
def test_matches_reference(device, data, page_size, pages, adversarial):
    batch, heads = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 3))
    count = batch * heads * pages
    if adversarial:
        flat = torch.tensor(data.draw(st.lists(SCORES, min_size=count, max_size=count)))
    else:
        flat = torch.randn(count, generator=torch.Generator().manual_seed(data.draw(st.integers(0, 999))))
    lengths = data.draw(st.lists(st.integers(0, pages * page_size), min_size=batch, max_size=batch))
    sink, recent = data.draw(st.integers(0, 20)), data.draw(st.integers(1, 40))
    forced = -(-sink // page_size) + (recent + page_size - 2) // page_size + 1
    budget = data.draw(st.integers(forced * page_size, (forced + pages) * page_size))
    protect = data.draw(st.none() | st.lists(st.integers(0, pages * page_size), min_size=batch, max_size=batch))
    protected_lens = None if protect is None else torch.tensor(protect, dtype=torch.int32, device=device)
    check(flat.view(batch, heads, pages).to(device), lengths, page_size, budget, sink=sink, recent=recent,
          protected_lens=protected_lens)  # fmt: skip


def test_many_pages_and_strides(device):
    scores = torch.randn(2, 4096, device=device).unsqueeze(1).expand(2, 3, 4096)
    pages, counts = check(scores, [65536, 50000], 16, 2048, sink=4, recent=64)
    assert (counts == 128).all()
    assert (pages.diff(dim=-1) > 0).all()


@pytest.mark.parametrize("max_pages", [12288, 70000])
def test_more_pages_than_are_kept_at_hand(device, max_pages):
    scores = torch.randn(1, 2, max_pages, generator=torch.Generator().manual_seed(0)).to(device)
    check(scores, [8 * max_pages - 3], 8, 512, sink=4, recent=64)


def test_budget_over_the_sequence_selects_every_page(device):
    pages, counts = check(torch.randn(1, 2, 10, device=device), [150], 16, 4096)
    assert pages.shape == (1, 2, 10) and counts.tolist() == [[10, 10]]
    assert pages[0, 0].tolist() == list(range(10))


def test_the_largest_options(device):
    most = 2**31 - 1
    check(torch.randn(1, 2, 10, device=device), [150], 16, 2**63 - 1, sink=most, recent=most)


def test_empty_cases(device):
    check(torch.empty(0, 2, 4, device=device), [], 16, 64)
    pages, counts = check(torch.randn(1, 1, 4, device=device), [0], 16, 64)
    assert counts.item() == 0 and (pages == -1).all()


def test_opcheck(device):
    args = (torch.randn(2, 3, 8, device=device), torch.tensor([100, 9], dtype=torch.int32, device=device), 16, 64)
    torch.library.opcheck(torch.ops.lil.select_pages.default, args, {"sink": 4, "recent": 16})


BAD = {
    "scores: expected shape": lambda a: a.update(scores=a["scores"][0]),
    "scores: expected Float, got Double": lambda a: a.update(scores=a["scores"].double()),
    "seq_lens: expected shape": lambda a: a.update(seq_lens=a["seq_lens"][:1]),
    "seq_lens: expected 0 to 128": lambda a: a.update(seq_lens=a["seq_lens"] + 100),
    "page_size: expected a page size": lambda a: a.update(page_size=20),
    "budget: expected at least 48 tokens": lambda a: a.update(budget=47, sink=4, recent=16),
    "budget: expected at least 16 tokens": lambda a: a.update(budget=0),
    "budget: expected": lambda a: a.update(budget=-64),
    "sink: expected": lambda a: a.update(sink=-1),
    "sink: expected .* 2147483647, got 9": lambda a: a.update(sink=2**63 - 1),
    "recent: expected at least 1": lambda a: a.update(recent=0),
    "recent: expected .* 2147483647, got 9": lambda a: a.update(recent=2**63 - 1),
    "protected_lens: expected shape": lambda a: a.update(protected_lens=a["seq_lens"][:1]),
}


@pytest.mark.parametrize("message", BAD)
def test_bad_input(device, message):
    args = dict(
        scores=torch.randn(2, 3, 8, device=device),
        seq_lens=torch.tensor([100, 9], dtype=torch.int32, device=device),
        page_size=16,
        budget=64,
    )
    BAD[message](args)
    with pytest.raises(RuntimeError, match=f"lil::select_pages: {message}"):
        lil_ops.select_pages(**args)
        lil_ops.check_errors()

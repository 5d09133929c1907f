import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import lil_ops
from lil_ops import reference

OPERATOR = "fold_mass"
RULES = ["sum", "last", "stamp"]


def case(device, batch, kv_heads, group, capacity, entries, page_size=1, seed=0):
    """``(priority, mass, held, seq_lens)``: masses are multiples of 1/64, so that sums are exact and many are equal."""
    g = torch.Generator().manual_seed(seed)
    pages = torch.randint(1, 2 * capacity + 2, (batch,), generator=g)
    held = torch.rand(batch, kv_heads, 2 * capacity + 2, generator=g).argsort(-1)[..., :capacity]
    held = held.where(held < pages[:, None, None], torch.tensor(-1))
    # Of every second sequence the newest token begins a page.
    length = (pages - 1) * page_size + torch.where(torch.arange(batch) % 2 == 0, 1, page_size)
    mass = torch.randint(0, 9, (batch, kv_heads * group, entries), generator=g) / 64
    priority = torch.rand(batch, kv_heads, capacity, generator=g)
    return tuple(t.to(device) for t in (priority, mass, held.int(), length.int()))


def check(priority, *arguments, **options):
    want = reference.fold_mass(priority, *arguments, **options)
    lil_ops.fold_mass(priority, *arguments, **options)
    torch.testing.assert_close(priority.double(), want, rtol=1e-6, atol=0)


@settings(max_examples=150, deadline=None)
@given(
    batch=st.integers(0, 3),
    kv_heads=st.integers(1, 3),
    group=st.integers(1, 9),
    capacity=st.integers(1, 300),
    more=st.integers(-20, 20),
    page_size=st.sampled_from([1, 8, 64]),
    rule=st.sampled_from(RULES),
    shared=st.booleans(),
    share=st.sampled_from([0.01, 0.3, 0.5, 1.0]),
    seed=st.integers(0, 1000),
)
def test_matches_reference(device, batch, kv_heads, group, capacity, more, page_size, rule, shared, share, seed):
    arguments = case(device, batch, kv_heads, group, capacity, max(0, capacity + more), page_size, seed)
    check(*arguments, page_size, rule=rule, shared=shared, share=share)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("capacity", [127, 128, 129, 1024, 2000])
def test_many_slots(device, rule, capacity):
    check(*case(device, 2, 2, 4, capacity, capacity), 1, rule=rule)


@pytest.mark.parametrize("rule", RULES)
def test_a_sequence_of_no_tokens_takes_no_part(device, rule):
    priority, mass, held, seq_lens = case(device, 3, 2, 2, 20, 20)
    seq_lens[1] = 0
    before = priority.clone()
    check(priority, mass, held, seq_lens, 1, rule=rule)
    assert torch.equal(priority[1], before[1]) and not torch.equal(priority[::2], before[::2])


def test_what_begins_forgets_what_was_there(device):
    held = torch.tensor([[[3, 4, -1]]], dtype=torch.int32, device=device)
    mass = torch.tensor([[[0.5, 0.25, 0], [0.5, 0.5, 0]]], device=device)
    for length, page_size, want in ((5, 1, [8.0, 0.75, 7]), (33, 8, [8, 0.75, 7]), (34, 8, [8, 7.75, 7])):
        priority = torch.full((1, 1, 3), 7.0, device=device)
        lengths = torch.tensor([length], dtype=torch.int32, device=device)
        lil_ops.fold_mass(priority, mass, held, lengths, page_size)
        assert priority.flatten().tolist() == want


def test_stamps_go_to_the_top_share_and_their_equals(device):
    held = torch.tensor([[[0, 1, 2, -1, 3, 4]]], dtype=torch.int32, device=device)
    mass = torch.tensor([[[0.1, 0.3, 0.3, 9.0, 0.2, 0.4]]], device=device)
    lengths = torch.tensor([40], dtype=torch.int32, device=device)
    for share, want in ((0.2, [0, 0, 0, 0, 0, 40]), (0.3, [0, 40, 40, 0, 0, 40]), (1.0, [40, 40, 40, 0, 40, 40])):
        priority = torch.zeros(1, 1, 6, device=device)
        lil_ops.fold_mass(priority, mass, held, lengths, 8, rule="stamp", share=share)
        assert priority.flatten().tolist() == want


def test_nan_stays_in_its_slot_and_sequence(device):
    for rule in RULES:
        priority, mass, held, lengths = case(device, 2, 1, 2, 40, 40)
        want = priority.clone()
        lil_ops.fold_mass(want, mass, held, lengths, 1, rule=rule)
        mass[0, 0, 5] = torch.nan
        lil_ops.fold_mass(priority, mass, held, lengths, 1, rule=rule)
        assert torch.equal(priority[1], want[1])
        if rule != "stamp":
            assert priority[0, 0, 5].isnan() and priority.isnan().sum() == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rule": "mean"}, "rule: expected 'sum', 'last' or 'stamp', got 'mean'"),
        ({"share": 0.0}, "share: expected above 0 and up to 1, got 0"),
        ({"page_size": 4}, "page_size: expected a page size"),
        ({"mass": torch.zeros(2, 5, 8)}, "mass: expected query heads that are a multiple of 2, got 5"),
        ({"mass": torch.zeros(1, 4, 8)}, "mass: expected"),
        ({"mass": torch.zeros(2, 8, 4).mT}, "mass: expected"),
        ({"mass": torch.zeros(2, 4, 8).half()}, "mass: expected"),
        ({"held": torch.zeros(2, 2, 7).int()}, "held: expected"),
        ({"held": torch.zeros(2, 2, 8)}, "held: expected"),
        ({"seq_lens": torch.zeros(3).int()}, "seq_lens: expected"),
        ({"priority": torch.zeros(2, 8)}, "priority: expected"),
        ({"priority": torch.zeros(2, 2, 8).double()}, "priority: expected"),
    ],
)
def test_errors(device, change, message):
    arguments = {
        "priority": torch.ones(2, 2, 8), "mass": torch.ones(2, 4, 8), "held": torch.zeros(2, 2, 8).int(),
        "seq_lens": torch.ones(2).int(), "page_size": 1, "rule": "sum", **change,
    }  # fmt: skip
    arguments = {name: x.to(device) if isinstance(x, torch.Tensor) else x for name, x in arguments.items()}
    before = arguments["priority"].clone()
    with pytest.raises(RuntimeError, match=f"lil::fold_mass: {message}"):
        lil_ops.fold_mass(**arguments)
    assert torch.equal(arguments["priority"], before)


@pytest.mark.parametrize("rule", RULES)
def test_negative_length(device, rule):
    priority, mass, held, seq_lens = case(device, 2, 2, 3, 9, 16, 8)
    seq_lens[1] = -5
    before = priority.clone()
    if device == "cpu":
        with pytest.raises(RuntimeError, match="lil::fold_mass: seq_lens: expected 0 to"):
            lil_ops.fold_mass(priority, mass, held, seq_lens, 8, rule=rule)
        assert torch.equal(priority, before)
    else:
        lil_ops.fold_mass(priority, mass, held, seq_lens, 8, rule=rule)
        assert torch.equal(priority[1], before[1])


def test_opcheck(device):
    arguments = case(device, 2, 2, 3, 9, 16, 8)
    for rule in RULES:
        torch.library.opcheck(torch.ops.lil.fold_mass, (*arguments, 8), {"rule": rule})

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import lil_ops
from lil_ops import reference

OPERATOR = "evict_pages"
NAMES = ["page_table", "held", "slot_pages", "priority", "seq_lens"]


def begun(device, batch, heads, capacity, max_pages):
    """Nothing is held: ``(page_table, held, slot_pages)``."""
    table = torch.full((batch, heads, max_pages), -1, dtype=torch.int32, device=device)
    held = torch.full((batch, heads, capacity), -1, dtype=torch.int32, device=device)
    slot_pages = torch.arange(batch * capacity, dtype=torch.int32, device=device).flip(0).view(batch, capacity)
    return table, held, slot_pages


def ints(values, device):
    return torch.tensor(values, dtype=torch.int32, device=device)


def check(table, held, slot_pages, priority, seq_lens, page_size, **options):
    """As the reference, in place; and the table says where the held pages are, and nothing else."""
    want = reference.evict_pages(table, held, slot_pages, priority, seq_lens, page_size, **options)
    slots = lil_ops.evict_pages(table, held, slot_pages, priority, seq_lens, page_size, **options)
    for a, b in zip((slots, table, held), want, strict=True):
        assert a.dtype == torch.int32 and torch.equal(a, b)
    implied = torch.full_like(table, -1)
    for b, h, s in (held >= 0).nonzero().tolist():
        implied[b, h, held[b, h, s]] = slot_pages[b, s]
    assert torch.equal(table, implied)
    return slots


PRIORITY = st.sampled_from([0.0, -0.0, 1.0, -1.0, 3e38, float("inf"), float("-inf"), float("nan")])


@settings(max_examples=60, deadline=None)
@given(
    data=st.data(),
    heads=st.integers(1, 3),
    sink=st.integers(0, 12),
    recent=st.integers(1, 20),
    extra=st.integers(0, 4),
    protect=st.none() | st.lists(st.integers(0, 70), min_size=2, max_size=2),
    adversarial=st.booleans(),
)
def test_matches_reference_over_a_sequence(device, data, heads, sink, recent, extra, protect, adversarial):
    """Two sequences grow side by side from nothing, token by token and by leaps, with new priorities at each step."""
    page_size, max_pages = 8, 12
    capacity = -(-sink // page_size) + (recent + page_size - 2) // page_size + 1 + extra
    state = begun(device, 2, heads, capacity, max_pages)
    options = {"sink": sink, "recent": recent, "protected_lens": None if protect is None else ints(protect, device)}
    starts = data.draw(st.lists(st.integers(0, 9), min_size=2, max_size=2))
    count = 2 * heads * capacity
    for step in range(0, 80, data.draw(st.sampled_from([1, 3, 8]))):
        if adversarial:
            flat = torch.tensor(data.draw(st.lists(PRIORITY, min_size=count, max_size=count)))
        else:
            flat = torch.randn(count, generator=torch.Generator().manual_seed(step))
        check(*state, flat.view(2, heads, capacity).to(device), ints([n + step for n in starts], device), page_size,
              **options)  # fmt: skip


def test_free_slots_first_then_the_least_priority(device):
    state = begun(device, 1, 2, 4, 10)
    priority = torch.tensor([[[5.0, 1.0, 3.0, 2.0], [0.5, 4.0, 0.25, 3.0]]], device=device)
    opened = [check(*state, priority, ints([n], device), 8).flatten().tolist() for n in (1, 8, 9, 17, 25, 33, 41)]
    assert opened == [[0, 0], [-1, -1], [1, 1], [2, 2], [3, 3], [1, 2], [1, 2]]
    table, held, slot_pages = state
    assert held.tolist() == [[[0, 5, 2, 3], [0, 1, 5, 3]]]
    assert table[0, 0, [0, 2, 3, 5]].tolist() == slot_pages[0, [0, 2, 3, 1]].tolist()


def test_what_is_always_kept(device):
    """Sink and recent stay whatever their priority; a prompt that does not fit loses its last page."""
    for options, want in (
        ({}, [2, 3, 4, 5]),
        ({"sink": 3}, [0, 3, 4, 5]),
        ({"recent": 10}, [2, 3, 4, 5]),
        ({"protected_lens": ints([17], device)}, [0, 1, 2, 5]),
        ({"protected_lens": ints([48], device)}, [0, 1, 2, 5]),
    ):
        state = begun(device, 1, 1, 4, 10)
        for length in range(1, 42):
            # The older, the less.
            priority = state[1].float().clamp_min(0)
            check(*state, priority, ints([length], device), 8, **options)
        assert sorted(state[1].flatten().tolist()) == want


def test_held_pages_are_what_attention_reads(device):
    """A head that evicted reads exactly the tokens it holds, and the masses lie beside its slots."""
    if device != "cpu":
        pytest.skip("one device is enough for the operators in a row")
    page_size, heads, capacity = 8, 2, 3
    table, held, slot_pages = begun(device, 1, heads, capacity, 12)
    k_cache, v_cache = (torch.zeros(capacity, heads, page_size, 64) for _ in range(2))
    g = torch.Generator().manual_seed(0)
    k, v, q = (torch.randn(90, heads, 64, generator=g) for _ in range(3))
    priority = torch.zeros(1, heads, capacity)
    for n in range(1, 91):
        seq_lens = ints([n], device)
        slots = lil_ops.evict_pages(table, held, slot_pages, priority, seq_lens, page_size, sink=2)
        if (slots >= 0).all():  # heads open their pages together
            priority.scatter_(2, slots[..., None].long(), 0.0)
        lil_ops.append_kv(k_cache, v_cache, None, k[n - 1 : n], v[n - 1 : n], table, seq_lens)
        mass = torch.empty(1, heads, capacity)
        out, _ = lil_ops.sparse_decode(q[n - 1 : n], k_cache, v_cache, table, seq_lens, held, page_mass=mass)
        priority += mass
        for h in range(heads):
            tokens = [t for page in sorted(p for p in held[0, h].tolist() if p >= 0)
                      for t in range(page * page_size, min(n, (page + 1) * page_size))]  # fmt: skip
            weights = (k[tokens, h] @ q[n - 1, h] * 64**-0.5).softmax(0)
            torch.testing.assert_close(out[0, h], weights @ v[tokens, h], rtol=1e-4, atol=1e-5)
            assert 0 in held[0, h] and (n - 1) // page_size in held[0, h]
            assert mass[0, h].sum().item() == pytest.approx(1.0, abs=1e-5)


def test_empty_cases(device):
    table, held, slot_pages = begun(device, 2, 2, 2, 3)
    priority = torch.zeros(2, 2, 2, device=device)
    assert check(table, held, slot_pages, priority, ints([0, 0], device), 8).tolist() == [[-1, -1]] * 2
    nothing = (t[:0].contiguous() for t in (table, held, slot_pages, priority, ints([0, 0], device)))
    assert lil_ops.evict_pages(*nothing, 8).shape == (0, 2)


def test_opcheck(device):
    state = begun(device, 2, 2, 3, 6)
    arguments = (*state, torch.rand(2, 2, 3, device=device), ints([9, 30], device), 8)
    torch.library.opcheck(
        torch.ops.lil.evict_pages.default, arguments, {"sink": 2, "protected_lens": ints([3, 9], device)}
    )


BAD = {
    "page_table: expected shape": lambda a: a.update(page_table=a["page_table"][:, 0]),
    "page_table: expected Int, got Long": lambda a: a.update(page_table=a["page_table"].long()),
    "held: expected shape": lambda a: a.update(held=a["held"][0]),
    "held: expected Int, got Long": lambda a: a.update(held=a["held"].long()),
    "held: expected a contiguous tensor": lambda a: a.update(held=a["held"].transpose(0, 1)),
    "held: expected a capacity of at least 4": lambda a: a.update(recent=18),
    "slot_pages: expected shape": lambda a: a.update(slot_pages=a["slot_pages"][:, :2]),
    "priority: expected Float, got Double": lambda a: a.update(priority=a["priority"].double()),
    "seq_lens: expected shape": lambda a: a.update(seq_lens=a["seq_lens"][:1]),
    "protected_lens: expected Int, got Long": lambda a: a.update(protected_lens=a["seq_lens"].long()),
    "page_size: expected a page size": lambda a: a.update(page_size=12),
    "sink: expected at least 0": lambda a: a.update(sink=-1),
    "recent: expected at least 1": lambda a: a.update(recent=0),
    "seq_lens: expected 0 to 48 tokens": lambda a: a.update(seq_lens=a["seq_lens"] + 40),
    "held: expected -1 or a page from 0 to 1": lambda a: a.update(held=a["held"] + 5),
    "slot_pages: expected a page": lambda a: a.update(slot_pages=a["slot_pages"] - 100),
}


@pytest.mark.parametrize("message", BAD)
def test_bad_input_writes_nothing(device, message):
    values = (*begun(device, 2, 2, 3, 6), torch.zeros(2, 2, 3, device=device), ints([9, 30], device))
    arguments = dict(zip(NAMES, values, strict=True), page_size=8)
    before = [t.clone() for t in values]
    BAD[message](arguments)
    with pytest.raises(RuntimeError, match=f"lil::evict_pages: {message}"):
        lil_ops.evict_pages(**arguments)
        lil_ops.check_errors()
    assert all(torch.equal(a, b) for a, b in zip(values, before, strict=True))


def test_compiled_equals_eager(device):
    """A step of evicting, appending and attending over what is held, as one graph; lengths grow without another."""
    page_size, heads, capacity = 8, 2, 3
    g = torch.Generator().manual_seed(0)
    k, v, q = (torch.randn(60, heads, 64, generator=g).to(device) for _ in range(3))

    def step(table, held, slot_pages, priority, k_cache, v_cache, q, k, v, seq_lens):
        lil_ops.evict_pages(table, held, slot_pages, priority, seq_lens, page_size, sink=2)
        lil_ops.append_kv(k_cache, v_cache, None, k, v, table, seq_lens)
        return lil_ops.sparse_decode(q, k_cache, v_cache, table, seq_lens, held)

    def state():
        caches = (torch.zeros(capacity, heads, page_size, 64, device=device) for _ in range(2))
        return *begun(device, 1, heads, capacity, 8), torch.rand(1, heads, capacity, device=device), *caches

    eager, compiled = state(), state()
    compiled[3].copy_(eager[3])
    run = torch.compile(step, fullgraph=True, dynamic=False)
    torch._dynamo.utils.counters.clear()
    for n in range(1, 61):
        inputs = q[n - 1 : n], k[n - 1 : n], v[n - 1 : n], ints([n], device)
        for a, b in zip(step(*eager, *inputs), run(*compiled, *inputs), strict=True):
            assert torch.equal(a, b)
    assert all(torch.equal(a, b) for a, b in zip(eager, compiled, strict=True))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1

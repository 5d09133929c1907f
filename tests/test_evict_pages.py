import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import lil_ops
from lil_ops import reference

OPERATOR = "evict_pages"


def begun(device, batch, heads, capacity, max_pages=None):
    """Nothing is held. ``(held, tables)``: the options are those of a cache whose slots are pages, or none."""
    held = torch.full((batch, heads, capacity), -1, dtype=torch.int32, device=device)
    if max_pages is None:
        return held, {}
    table = torch.full((batch, heads, max_pages), -1, dtype=torch.int32, device=device)
    slot_pages = torch.arange(batch * capacity, dtype=torch.int32, device=device).flip(0).view(batch, capacity)
    return held, {"page_table": table, "slot_pages": slot_pages}


def ints(values, device):
    return torch.tensor(values, dtype=torch.int32, device=device)


def check(held, priority, seq_lens, page_size, **options):
    """As the reference, in place; and the table says where the held pages are, and nothing else."""
    want_slots, want_held, want_table = reference.evict_pages(held, priority, seq_lens, page_size, **options)
    slots = lil_ops.evict_pages(held, priority, seq_lens, page_size, **options)
    assert slots.dtype == torch.int32 and torch.equal(slots, want_slots) and torch.equal(held, want_held)
    if want_table is not None:
        table, slot_pages = options["page_table"], options["slot_pages"]
        assert torch.equal(table, want_table)
        implied = torch.full_like(table, -1)
        for b, h, s in (held >= 0).nonzero().tolist():
            implied[b, h, held[b, h, s]] = slot_pages[b, s]
        assert torch.equal(table, implied)
    return slots


PRIORITY = st.sampled_from([0.0, -0.0, 1.0, -1.0, 3e38, 1e-40, float("inf"), float("-inf"), float("nan")])


@settings(max_examples=100, deadline=None)
@given(
    data=st.data(),
    page_size=st.sampled_from([None, 1, 8]),
    heads=st.integers(1, 3),
    sink=st.integers(0, 12),
    recent=st.integers(1, 20),
    extra=st.integers(0, 4),
    protect=st.none() | st.lists(st.integers(0, 70), min_size=2, max_size=2),
    adversarial=st.booleans(),
)
def test_matches_reference_over_a_sequence(device, data, page_size, heads, sink, recent, extra, protect, adversarial):
    """Two sequences grow side by side from nothing, token by token and by leaps, with new priorities at each step."""
    max_pages = None if page_size else 12  # with a table, or without
    page_size = page_size or 8
    capacity = -(-sink // page_size) + (recent + page_size - 2) // page_size + 1 + extra
    held, tables = begun(device, 2, heads, capacity, max_pages)
    options = {"sink": sink, "recent": recent, "protected_lens": None if protect is None else ints(protect, device)}
    starts = data.draw(st.lists(st.integers(0, 9), min_size=2, max_size=2))
    count = 2 * heads * capacity
    for step in range(0, 80, data.draw(st.sampled_from([1, 3, 8]))):
        if adversarial:
            flat = torch.tensor(data.draw(st.lists(PRIORITY, min_size=count, max_size=count)))
        else:
            flat = torch.randn(count, generator=torch.Generator().manual_seed(step))
        priority = flat.view(2, heads, capacity).to(device)
        check(held, priority, ints([n + step for n in starts], device), page_size, **options, **tables)


@pytest.mark.parametrize("with_table", [False, True])
@pytest.mark.parametrize("capacity", [2, 31, 32, 33, 500, 1024, 1025, 5000])
def test_many_slots(device, capacity, with_table):
    """Few different priorities, NaN among them; full heads, and one with free slots."""
    g = torch.Generator().manual_seed(capacity)
    page_size, pages = 8 if with_table else 1, 2 * capacity
    held, tables = begun(device, 3, 2, capacity, pages + 3 if with_table else None)
    held.copy_(torch.stack([torch.randperm(pages, generator=g)[:capacity] for _ in range(6)]).view(held.shape))
    held[2, 1, torch.randperm(capacity, generator=g)[: capacity // 3]] = -1
    if with_table:
        for b, h, s in (held >= 0).nonzero().tolist():
            tables["page_table"][b, h, held[b, h, s]] = tables["slot_pages"][b, s]
    values = torch.tensor([0.25, -0.0, 0.0, 0.5, torch.nan])
    priority = values[torch.randint(0, 5, held.shape, generator=g)].to(device)
    priority[1, 1] = torch.nan
    priority[0, 0] = 1.0
    for n in range(pages, pages + 3):
        check(held, priority, ints([n * page_size + 1] * 3, device), page_size, **tables)


def test_free_slots_first_then_the_least_priority(device):
    held, tables = begun(device, 1, 2, 4, 10)
    priority = torch.tensor([[[5.0, 1.0, 3.0, 2.0], [0.5, 4.0, 0.25, 3.0]]], device=device)
    lengths = 1, 8, 9, 17, 25, 33, 41
    opened = [check(held, priority, ints([n], device), 8, **tables).flatten().tolist() for n in lengths]
    assert opened == [[0, 0], [-1, -1], [1, 1], [2, 2], [3, 3], [1, 2], [1, 2]]
    assert held.tolist() == [[[0, 5, 2, 3], [0, 1, 5, 3]]]
    table, slot_pages = tables.values()
    assert table[0, 0, [0, 2, 3, 5]].tolist() == slot_pages[0, [0, 2, 3, 1]].tolist()


@pytest.mark.parametrize("max_pages", [None, 10])
def test_what_is_always_kept(device, max_pages):
    """Sink and recent stay whatever their priority; a prompt that does not fit loses its last page."""
    for options, want in (
        ({}, [2, 3, 4, 5]),
        ({"sink": 3}, [0, 3, 4, 5]),
        ({"recent": 10}, [2, 3, 4, 5]),
        ({"protected_lens": ints([17], device)}, [0, 1, 2, 5]),
        ({"protected_lens": ints([48], device)}, [0, 1, 2, 5]),
    ):
        held, tables = begun(device, 1, 1, 4, max_pages)
        for length in range(1, 42):
            # The older, the less.
            check(held, held.float().clamp_min(0), ints([length], device), 8, **options, **tables)
        assert sorted(held.flatten().tolist()) == want


def test_token_slots_of_equal_priority_are_a_sliding_window_behind_the_sink(device):
    capacity, sink = 7, 4
    held, _ = begun(device, 2, 2, capacity)
    priority = torch.zeros(2, 2, capacity, device=device)
    for n in range(1, 30):
        slots = check(held, priority, ints([n, n + 100], device), 1, sink=sink)
        assert (held.gather(2, slots[..., None].long()).squeeze(2) == ints([[n - 1], [n + 99]], device)).all()
        if n > capacity:
            assert sorted(held[0, 1].tolist()) == [*range(sink), *range(n - capacity + sink, n)]


@pytest.mark.parametrize("page_size", [1, 8, 128])
def test_lengths_without_a_table_end_with_int32(device, page_size):
    held, _ = begun(device, 1, 1, 3)
    for n in (2**31 - 1 - 2 * page_size, 2**31 - 1 - page_size, 2**31 - 1, 2**31 - 1):
        check(held, torch.ones(1, 1, 3, device=device), ints([n], device), page_size)
    assert held.tolist() == [[[(2**31 - 2) // page_size - i for i in (2, 1, 0)]]]


def attention_of(q, k, v, tokens, h):
    weights = (k[tokens, h] @ q[h] * 64**-0.5).softmax(0)
    return weights @ v[tokens, h]


def test_held_pages_are_what_attention_reads(device):
    """A head that evicted reads exactly the tokens it holds, and the masses lie beside its slots."""
    page_size, heads, capacity = 8, 2, 3
    held, tables = begun(device, 1, heads, capacity, 12)
    table = tables["page_table"]
    k_cache, v_cache = (torch.zeros(capacity, heads, page_size, 64, device=device) for _ in range(2))
    g = torch.Generator().manual_seed(0)
    k, v, q = (torch.randn(90, heads, 64, generator=g).to(device) for _ in range(3))
    priority = torch.zeros(1, heads, capacity, device=device)
    for n in range(1, 91):
        seq_lens = ints([n], device)
        slots = lil_ops.evict_pages(held, priority, seq_lens, page_size, sink=2, **tables)
        if (slots >= 0).all():  # heads open their pages together
            priority.scatter_(2, slots[..., None].long(), 0.0)
        lil_ops.append_kv(k_cache, v_cache, None, k[n - 1 : n], v[n - 1 : n], table, seq_lens)
        mass = torch.empty(1, heads, capacity, device=device)
        out, _ = lil_ops.sparse_decode(q[n - 1 : n], k_cache, v_cache, table, seq_lens, held, page_mass=mass)
        priority += mass
        for h in range(heads):
            tokens = [t for page in held[0, h].tolist() if page >= 0
                      for t in range(page * page_size, min(n, (page + 1) * page_size))]  # fmt: skip
            want = attention_of(q[n - 1], k, v, tokens, h)
            torch.testing.assert_close(out[0, h], want, rtol=1e-4, atol=1e-5)
            assert 0 in held[0, h] and (n - 1) // page_size in held[0, h]
            assert mass[0, h].sum().item() == pytest.approx(1.0, abs=1e-5)


def test_held_tokens_are_what_attention_reads(device):
    """Slots are tokens: the table is shared, and attention is dense over the slots in use."""
    page_size, heads, pages = 8, 2, 2
    capacity = page_size * pages
    held, _ = begun(device, 1, heads, capacity)
    k_cache, v_cache = (torch.full((pages, heads, page_size, 64), torch.nan, device=device) for _ in range(2))
    g = torch.Generator().manual_seed(0)
    k, v, q = (torch.randn(60, heads, 64, generator=g).to(device) for _ in range(3))
    table, priority = ints([[1, 0]], device), torch.zeros(1, heads, capacity, device=device)
    for n in range(1, 61):
        slots = lil_ops.evict_pages(held, priority, ints([n], device), 1, sink=2, recent=3)
        priority.scatter_(2, slots[..., None].long(), 0.0)
        used = ints([min(n, capacity)], device)
        lil_ops.append_kv(k_cache, v_cache, None, k[n - 1 : n], v[n - 1 : n], table, used, slots=slots)
        mass = torch.empty(1, heads, capacity, device=device)
        out, _ = lil_ops.sparse_decode(q[n - 1 : n], k_cache, v_cache, table, used, token_mass=mass)
        priority += mass
        for h in range(heads):
            tokens = [t for t in held[0, h].tolist() if t >= 0]
            want = attention_of(q[n - 1], k, v, tokens, h)
            torch.testing.assert_close(out[0, h], want, rtol=1e-4, atol=1e-5)
            assert len(tokens) == min(n, capacity)
            assert {*range(min(n, 2)), *range(max(0, n - 3), n)} <= set(tokens)


def test_a_sequence_of_no_tokens_takes_no_part(device):
    """Whatever it holds: a row of a fixed batch may stand still."""
    held, priority = ints([[[3, 0]], [[5, 4]]], device), torch.zeros(2, 1, 2, device=device)
    assert lil_ops.evict_pages(held, priority, ints([0, 7], device), 1).tolist() == [[-1], [1]]
    assert held.tolist() == [[[3, 0]], [[5, 6]]]
    if device == "cuda":
        lil_ops.check_errors()


@pytest.mark.parametrize("max_pages", [None, 3])
def test_empty_cases(device, max_pages):
    held, tables = begun(device, 2, 2, 2, max_pages)
    priority = torch.zeros(2, 2, 2, device=device)
    assert check(held, priority, ints([0, 0], device), 8, **tables).tolist() == [[-1, -1]] * 2
    none = {name: t[:0].contiguous() for name, t in tables.items()}
    assert lil_ops.evict_pages(held[:0], priority[:0], ints([], device), 8, **none).shape == (0, 2)


@pytest.mark.parametrize("page_size, max_pages", [(8, 6), (1, None)])
def test_opcheck(device, page_size, max_pages):
    held, tables = begun(device, 2, 2, 3, max_pages)
    arguments = held, torch.rand(2, 2, 3, device=device), ints([9, 30], device), page_size
    options = {"sink": 2, "protected_lens": ints([3, 9], device), **tables}
    torch.library.opcheck(torch.ops.lil.evict_pages.default, arguments, options)


BAD = {
    "page_table: expected shape": lambda a: a.update(page_table=a["page_table"][:, 0]),
    "page_table: expected Int, got Long": lambda a: a.update(page_table=a["page_table"].long()),
    "page_table: expected both page_table and slot_pages": lambda a: a.update(page_table=None),
    "slot_pages: expected both page_table and slot_pages": lambda a: a.update(slot_pages=None),
    "held: expected shape": lambda a: a.update(held=a["held"][0]),
    "held: expected Int, got Long": lambda a: a.update(held=a["held"].long()),
    "held: expected a contiguous tensor": lambda a: a.update(held=a["held"].transpose(0, 1)),
    "held: expected a capacity of at least 4": lambda a: a.update(recent=18),
    "slot_pages: expected shape": lambda a: a.update(slot_pages=a["slot_pages"][:, :2]),
    "priority: expected Float, got Double": lambda a: a.update(priority=a["priority"].double()),
    "seq_lens: expected shape": lambda a: a.update(seq_lens=a["seq_lens"][:1]),
    "protected_lens: expected Int, got Long": lambda a: a.update(protected_lens=a["seq_lens"].long()),
    "page_size: expected a page size": lambda a: a.update(page_size=12),
    "page_size: expected a page size that": lambda a: a.update(page_size=1),  # with a table
    "page_size: expected a page size that is": lambda a: a.update(page_size=2, page_table=None, slot_pages=None),
    "sink: expected at least 0": lambda a: a.update(sink=-1),
    "recent: expected at least 1": lambda a: a.update(recent=0),
    "seq_lens: expected 0 to 48 tokens": lambda a: a.update(seq_lens=a["seq_lens"] + 40),
    "seq_lens: expected 0 to 2147483647 tokens for": lambda a: a.update(
        seq_lens=a["seq_lens"] - 31, page_table=None, slot_pages=None
    ),
    "held: expected -1 or a page from 0 to": lambda a: a.update(held=a["held"] + 5),
    "held: expected -1 or a page from": lambda a: a.update(held=a["held"] - 1),
    "slot_pages: expected a page": lambda a: a.update(slot_pages=a["slot_pages"] - 100),
}


def tensors_of(arguments):
    return {name: t for name, t in arguments.items() if isinstance(t, torch.Tensor)}


@pytest.mark.parametrize("message", BAD)
def test_bad_input_writes_nothing(device, message):
    held, tables = begun(device, 2, 2, 3, 6)
    arguments = {"held": held, "priority": torch.zeros(2, 2, 3, device=device), "seq_lens": ints([9, 30], device),
                 "page_size": 8, **tables}  # fmt: skip
    BAD[message](arguments)
    before = {name: t.clone() for name, t in tensors_of(arguments).items()}
    with pytest.raises(RuntimeError, match=f"lil::evict_pages: {message}"):
        lil_ops.evict_pages(**arguments)
        lil_ops.check_errors()
    assert all(torch.equal(t, before[name]) for name, t in tensors_of(arguments).items())


@pytest.mark.parametrize("name", ["held", "seq_lens", "slot_pages"])
def test_a_bad_value_stays_in_its_head(device, name):
    """On CUDA that head, or those of that sequence, are left as they were, and the others are done."""
    held, tables = begun(device, 2, 3, 4, 6)
    arguments = {"held": held, "priority": torch.rand(2, 3, 4, device=device), "seq_lens": ints([9, 30], device)}
    good = {key: t.clone() for key, t in (arguments | tables).items()}
    bad_heads = torch.zeros(2, 3, dtype=torch.bool, device=device)
    if name == "held":
        held[0, 1, 3], bad_heads[0, 1] = 2, True
    else:
        (arguments | tables)[name][1], bad_heads[1] = -7, True
    want = reference.evict_pages(**good, page_size=8)
    before = held.clone(), tables["page_table"].clone()
    with pytest.raises(RuntimeError, match=f"lil::evict_pages: {name}: expected"):
        slots = lil_ops.evict_pages(**arguments, **tables, page_size=8)
        if device != "cpu":
            expected = -1, *before
            for got, w, untouched in zip((slots, held, tables["page_table"]), want, expected, strict=True):
                bad = bad_heads.view(2, 3, *[1] * (got.dim() - 2))
                assert torch.equal(got, torch.where(bad, untouched, w))
        lil_ops.check_errors()
    if device == "cpu":
        assert torch.equal(held, before[0]) and torch.equal(tables["page_table"], before[1])


def compiled_equals_eager(step, state, inputs):
    """One graph while lengths grow; results and state are eager's."""
    eager, compiled = state(), state()
    run = torch.compile(step, fullgraph=True, dynamic=False)
    torch._dynamo.utils.counters.clear()
    for arguments in inputs:
        for a, b in zip(step(*eager, *arguments), run(*compiled, *arguments), strict=True):
            assert torch.equal(a, b)
    assert all(torch.equal(a, b) for a, b in zip(eager, compiled, strict=True))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


def step_inputs(device, heads, steps):
    g = torch.Generator().manual_seed(0)
    for n in range(1, steps + 1):
        yield *(torch.randn(1, heads, 64, generator=g).to(device) for _ in range(3)), ints([n], device)


def test_compiled_equals_eager(device):
    """A step of evicting, appending and attending over the pages that are held."""
    page_size, heads, capacity = 8, 2, 3

    def step(held, page_table, slot_pages, priority, k_cache, v_cache, q, k, v, seq_lens):
        tables = {"page_table": page_table, "slot_pages": slot_pages}
        lil_ops.evict_pages(held, priority, seq_lens, page_size, sink=2, **tables)
        lil_ops.append_kv(k_cache, v_cache, None, k, v, page_table, seq_lens)
        return lil_ops.sparse_decode(q, k_cache, v_cache, page_table, seq_lens, held)

    def state():
        held, tables = begun(device, 1, heads, capacity, 8)
        priority = torch.rand(1, heads, capacity, generator=torch.Generator().manual_seed(1)).to(device)
        caches = (torch.zeros(capacity, heads, page_size, 64, device=device) for _ in range(2))
        return held, *tables.values(), priority, *caches

    compiled_equals_eager(step, state, step_inputs(device, heads, 60))


def test_compiled_equals_eager_by_tokens(device):
    """The same where slots are tokens, and the masses are what decides."""
    page_size, heads, pages = 8, 2, 2
    capacity = page_size * pages

    def step(held, priority, k_cache, v_cache, page_table, q, k, v, seq_lens):
        slots = lil_ops.evict_pages(held, priority, seq_lens, 1, sink=2, recent=3)
        used = seq_lens.clamp(max=capacity)
        lil_ops.append_kv(k_cache, v_cache, None, k, v, page_table, used, slots=slots)
        out, lse = lil_ops.sparse_decode(q, k_cache, v_cache, page_table, used, token_mass=priority)
        return out, lse, slots

    def state():
        held, _ = begun(device, 1, heads, capacity)
        caches = (torch.zeros(pages, heads, page_size, 64, device=device) for _ in range(2))
        return held, torch.zeros(1, heads, capacity, device=device), *caches, ints([[1, 0]], device)

    compiled_equals_eager(step, state, step_inputs(device, heads, 40))

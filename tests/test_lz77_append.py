import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import lil_ops
from lil_ops import _C, ops
from lil_ops.reference.lz77_append import lz77_sizes
from lil_ops.stopping import Lz77Tracker

OPERATOR = "lz77_append"
VOCAB = 50000


def de_bruijn(symbols, order):
    """Each word of `order` symbols once: the concatenated Lyndon words whose length divides the order."""
    sequence, word = [], [-1]
    while word:
        word[-1] += 1
        if order % len(word) == 0:
            sequence += word
        word = [word[i % len(word)] for i in range(order)]
        while word and word[-1] == symbols - 1:
            word.pop()
    return sequence


def fibonacci(n):
    a, b = [0], [0, 1]
    while len(b) < n:
        a, b = b, b + a
    return b[:n]


def random_tokens(n, vocab, seed=0):
    return torch.randint(0, vocab, (n,), generator=torch.Generator().manual_seed(seed)).tolist()


SEQUENCES = {
    "one token": [7],
    "constant": [3] * 100,
    "constant, then another": [3] * 60 + [4] + [3] * 60 + [5],
    "growing runs": [t for k in range(14) for t in [0] * k + [1]],
    "period 2": [0, 1] * 50,
    "period 3, broken": [0, 1, 2] * 20 + [2] + [0, 1, 2] * 20,
    "all different": list(range(100)),
    "binary, random": random_tokens(200, 2),
    "four tokens, random": random_tokens(200, 4),
    "large vocabulary, random": random_tokens(200, VOCAB),
    "binary de Bruijn": de_bruijn(2, 7),
    "de Bruijn": de_bruijn(5, 3),
    "fibonacci": fibonacci(150),
    "thue-morse": [i.bit_count() & 1 for i in range(150)],
    "copy of far history": random_tokens(80, VOCAB) * 2 + random_tokens(80, VOCAB)[::-1],
    "palindrome": random_tokens(80, 3) + random_tokens(80, 3)[::-1],
    "squares of squares": [0, 1] * 8 + [2] + ([0, 1] * 8 + [2]) * 4,
}


def feed(device, tokens, cuts=(), vocab_size=VOCAB, dtype=torch.int64, capacity=None):
    """The size after each call, the tokens split at the given places."""
    state = ops.lz77_state(1, capacity or max(1, len(tokens)), device)
    sizes = []
    for first, last in itertools.pairwise([0, *cuts, len(tokens)]):
        part = torch.tensor([tokens[first:last]], dtype=dtype, device=device).view(1, -1)
        phrases, bits = ops.lz77_append(state, part, None, vocab_size)
        assert phrases.dtype == bits.dtype == torch.int32 and phrases.shape == bits.shape == (1,)
        sizes.append((phrases.item(), bits.item()))
    return sizes


def expected(tokens, vocab_size=VOCAB):
    return [(0, 0), *zip(*lz77_sizes(tokens, vocab_size), strict=True)]


def brute_force(tokens, vocab_size=VOCAB):
    """The same for longer sequences: each token narrows the places where all of the phrase occurs."""
    tokens, start, places = np.array(tokens, dtype=np.int64), 0, np.array([], dtype=np.int64)
    before, sizes = (0, 0), [(0, 0)]
    for end in range(len(tokens)):
        if start == end:
            places = np.arange(start)
        places = places[tokens[places + end - start] == tokens[end]]
        price = start.bit_length() + 2 * (end - start + 1).bit_length() - 1 + (vocab_size - 1).bit_length()
        sizes.append((before[0] + 1, before[1] + price))
        if len(places) == 0:
            start, before = end + 1, sizes[-1]
    return sizes


def sizes_of(result):
    return list(zip(*(t.tolist() for t in result), strict=True))


def test_definition_by_hand():
    # a | b | (ab)c | (abcab)d | pending: ab
    tokens = [0, 1, 0, 1, 2, 0, 1, 2, 0, 1, 3, 0, 1]
    phrases, bits = lz77_sizes(tokens, 4)
    assert phrases == [1, 2, 3, 3, 3, 4, 4, 4, 4, 4, 4, 5, 5]
    # position, Elias gamma of the length, token: (0, 1, 2), (1, 1, 2), (2, 3, 2)
    assert bits[:5] == [3, 3 + 4, 7 + 2 + 1 + 2, 7 + 2 + 3 + 2, 7 + 2 + 3 + 2]


@pytest.mark.parametrize("name", SEQUENCES)
def test_brute_force_is_the_definition(name):
    assert brute_force(SEQUENCES[name]) == expected(SEQUENCES[name])


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("name", SEQUENCES)
def test_each_token(device, name, dtype):
    tokens = SEQUENCES[name]
    assert feed(device, tokens, range(1, len(tokens)), dtype=dtype) == expected(tokens)[1:]


@pytest.mark.parametrize("name", SEQUENCES)
def test_every_split_in_two(device, name):
    tokens = SEQUENCES[name]
    want = expected(tokens)
    for cut in range(len(tokens) + 1):
        assert feed(device, tokens, [cut]) == [want[cut], want[-1]]


@pytest.mark.parametrize("name", SEQUENCES)
def test_trace_is_the_operator(name):
    tokens = SEQUENCES[name]
    for dtype in (np.int32, np.int64):
        phrases, bits = _C.lz77_trace(np.array(tokens, dtype), VOCAB)
        assert phrases.dtype == bits.dtype == np.int32
        assert list(zip(phrases.tolist(), bits.tolist(), strict=True)) == expected(tokens)[1:]


@st.composite
def token_lists(draw, max_size=120):
    """Short alphabets, and pieces that repeat what came before: the strings that a suffix tree finds hard."""
    symbols = draw(st.sampled_from([1, 2, 3, 8, VOCAB]))
    tokens = draw(st.lists(st.integers(0, symbols - 1), max_size=20))
    for _ in range(draw(st.integers(0, 6))):
        if not tokens:
            break
        start = draw(st.integers(0, len(tokens) - 1))
        for i in range(draw(st.integers(1, 40))):
            tokens.append(tokens[start + i])
        tokens += draw(st.lists(st.integers(0, symbols - 1), max_size=3))
    return tokens[:max_size]


@settings(max_examples=300, deadline=None)
@given(tokens=token_lists(), vocab_size=st.sampled_from([VOCAB, VOCAB + 1, 65536, 2**31 - 1]), data=st.data())
def test_any_tokens_split_anywhere(device, tokens, vocab_size, data):
    cuts = sorted(data.draw(st.lists(st.integers(0, len(tokens)), max_size=6)))
    want = expected(tokens, vocab_size)
    assert feed(device, tokens, cuts, vocab_size) == [want[cut] for cut in [*cuts, len(tokens)]]


@st.composite
def long_token_lists(draw, max_size=900):
    """Pieces of periodic, random and copied tokens, each some hundred long: matches over many words of 32 tokens."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    symbols = draw(st.sampled_from([1, 2, 4, 30, VOCAB]))
    size = draw(st.integers(1, max_size))
    tokens = rng.integers(0, symbols, draw(st.integers(1, 80))).tolist()
    for kind in draw(st.lists(st.sampled_from(["copy", "period", "random", "one"]), max_size=8)):
        length = int(rng.integers(1, 400))
        if kind == "copy":
            start = int(rng.integers(0, len(tokens)))
            for i in range(length):
                tokens.append(tokens[start + i])
        elif kind == "period":
            tokens += np.resize(rng.integers(0, symbols, rng.integers(1, 6)), length).tolist()
        else:
            tokens += rng.integers(0, symbols, length if kind == "random" else 1).tolist()
    return tokens[:size]


def split_everywhere(device, tokens, vocab_size, dtype=torch.int32):
    """One row for each place: (the size up to there, the size of all), in two calls."""
    n = len(tokens)
    places = torch.arange(n + 1, dtype=torch.int32)
    state, row = ops.lz77_state(n + 1, n, device), torch.tensor(tokens, dtype=dtype)
    first = ops.lz77_append(state, row.expand(n + 1, n).to(device), places.to(device), vocab_size)
    rest = row[(torch.arange(n) + places[:, None]).clamp_max(n - 1)]
    return sizes_of(first), sizes_of(ops.lz77_append(state, rest.to(device), (n - places).to(device), vocab_size))


@settings(max_examples=40, deadline=None)
@given(tokens=long_token_lists(), vocab_size=st.sampled_from([VOCAB, 65535, 65536, 2**20, 2**31 - 1]))
def test_long_tokens_split_at_every_place(device, tokens, vocab_size):
    want = brute_force(tokens, vocab_size)
    first, last = split_everywhere(device, tokens, vocab_size)
    assert first == want and last == [want[-1]] * len(want)


@settings(max_examples=40, deadline=None)
@given(tokens=long_token_lists(max_size=4000), data=st.data())
def test_long_tokens_in_pieces(device, tokens, data):
    """Pieces of any size: a few tokens and many go different ways on CUDA."""
    cuts = set(data.draw(st.lists(st.integers(0, len(tokens)), max_size=6)))
    cuts |= {cut + i for cut in cuts for i in range(data.draw(st.integers(0, 3)))}
    cuts = sorted(cut for cut in cuts if cut <= len(tokens))
    want = brute_force(tokens)
    assert feed(device, tokens, cuts) == [want[cut] for cut in [*cuts, len(tokens)]]


@settings(max_examples=60, deadline=None)
@given(rows=st.lists(token_lists(max_size=40), min_size=1, max_size=5), data=st.data())
def test_ragged_batches(device, rows, data):
    """Rows advance each at its own pace, zero tokens included; places that do not count hold nonsense."""
    state = ops.lz77_state(len(rows), max(1, *map(len, rows)), device)
    places = [0] * len(rows)
    while any(place < len(row) for place, row in zip(places, rows, strict=True)):
        counts = [data.draw(st.integers(0, min(9, len(row) - place))) for place, row in zip(places, rows, strict=True)]
        counts[-1] = counts[-1] or min(1, len(rows[-1]) - places[-1])
        tokens = torch.full((len(rows), max(1, *counts) + 1), -5, dtype=torch.int32, device=device)
        for b, count in enumerate(counts):
            tokens[b, :count] = torch.tensor(rows[b][places[b] : places[b] + count], dtype=torch.int32)
            places[b] += count
        phrases, bits = ops.lz77_append(state, tokens, torch.tensor(counts, dtype=torch.int32, device=device), VOCAB)
        want = [expected(row[:place])[-1] for row, place in zip(rows, places, strict=True)]
        assert list(zip(phrases.tolist(), bits.tolist(), strict=True)) == want


@pytest.mark.parametrize("threads", [1, 2])
def test_large_batch(device, threads):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        tokens = torch.randint(0, 6, (70, 90), generator=torch.Generator().manual_seed(1)).to(device)
        phrases, bits = ops.lz77_append(ops.lz77_state(70, 90, device), tokens, None, 6)
    finally:
        torch.set_num_threads(before)
    want = [expected(row, 6)[-1] for row in tokens.tolist()]
    assert list(zip(phrases.tolist(), bits.tolist(), strict=True)) == want


def test_long_sequences_agree_with_the_curve_in_pieces(device):
    """Beyond what the definition can check: a call a token, one call for all, and the trace are the same parse."""
    for tokens in (random_tokens(20000, 2), random_tokens(20000, VOCAB), [1] * 19999 + [2], [*range(10000)] * 2):
        phrases, bits = _C.lz77_trace(np.array(tokens), VOCAB)
        curve = list(zip(phrases.tolist(), bits.tolist(), strict=True))
        assert feed(device, tokens) == curve[-1:]
        assert feed(device, tokens, range(100, 20000, 100)) == [*curve[99:-1:100], curve[-1]]
        assert (np.diff(phrases) >= 0).all() and (np.diff(phrases) <= 1).all()


@pytest.mark.parametrize("vocab_size", [200, VOCAB, 2**31 - 1])
@pytest.mark.parametrize("high", [16, 32, 16 << 3])
def test_stretches_that_differ_in_high_bits_alone(device, vocab_size, high):
    """Their low bits are copies of each other: small tokens, looked at by themselves, must not match large ones."""
    small, other = random_tokens(1500, 3, seed=1), random_tokens(700, 12, seed=2)
    tokens = small + [high + token for token in small] + other + small[200:] + [high + token for token in other] + small
    for cuts in ([], [1400, 2900, 5000], [1024, 2048]):
        sizes = feed(device, tokens, cuts, vocab_size, torch.int32)
        curve = _C.lz77_trace(np.array(tokens), vocab_size)
        assert sizes == [tuple(int(size[at - 1]) for size in curve) for at in (*cuts, len(tokens))]


def test_strided_rows(device):
    wide = torch.randint(0, 3, (4, 50), device=device)
    for tokens in (wide[:, 5:25], wide[::2, :20], wide[:1, :20].expand(3, 20)):
        state = ops.lz77_state(len(tokens), 20, device)
        assert ops.lz77_append(state, tokens, None, 3)[0].tolist() == [
            lz77_sizes(row, 3)[0][-1] for row in tokens.tolist()
        ]


@pytest.mark.parametrize("capacity", [1, 2, 3, 15, 16, 17])
def test_full_to_the_last_token(device, capacity):
    for tokens in ([0] * capacity, list(range(capacity))):
        assert feed(device, tokens, capacity=capacity) == [expected(tokens)[-1]]
        message = f"room for {capacity + 1} tokens" if device == "cpu" else f"a capacity of at least {capacity + 1}"
        with pytest.raises(RuntimeError, match=message):
            feed(device, [*tokens, 0], capacity=capacity)
            lil_ops.check_errors()


def test_empty(device):
    for batch, width in ((0, 4), (0, 0), (3, 0)):
        tokens = torch.zeros(batch, width, dtype=torch.int64, device=device)
        phrases, bits = ops.lz77_append(ops.lz77_state(batch, 8, device), tokens, None, VOCAB)
        assert phrases.tolist() == bits.tolist() == [0] * batch


def test_a_row_can_be_emptied(device):
    state = ops.lz77_state(2, 50, device)
    tokens = torch.randint(0, 4, (2, 40), device=device)
    first = ops.lz77_append(state, tokens, None, 4)
    state.zero_()
    again = ops.lz77_append(state, tokens, None, 4)
    assert torch.equal(first[0], again[0]) and torch.equal(first[1], again[1])


def test_a_slot_can_be_used_again(device):
    """A row that is emptied starts anew beside rows that go on, whatever was in it."""
    g = torch.Generator().manual_seed(3)
    state, rows = ops.lz77_state(4, 600, device), [[] for _ in range(4)]
    for turn in range(40):
        again = turn * 7 % 4
        state[again].zero_()
        rows[again] = []
        tokens = torch.randint(0, 1 + turn % 5, (4, 60), generator=g)
        counts = torch.tensor([(turn * 13 + 29 * b) % (61 if turn % 3 else 3) for b in range(4)], dtype=torch.int32)
        counts = torch.minimum(counts, 600 - torch.tensor([len(row) for row in rows])).int()
        for row, new, count in zip(rows, tokens.tolist(), counts.tolist(), strict=True):
            row += new[:count]
        got = sizes_of(ops.lz77_append(state, tokens.to(device), counts.to(device), 5))
        assert got == [brute_force(row, 5)[-1] for row in rows]


@pytest.mark.parametrize("piece", [1, 3, 40])
def test_another_vocabulary_size(device, piece):
    """It sets prices alone: a token that is too large for it is still another token."""
    tokens = torch.tensor([[5, 65541, 255, 5, 65541, 9, 5, 255, 5, 5, 255, 5] + [255, 5, 7] * 16], device=device)
    want = [a for a, _ in brute_force(tokens[0].tolist(), 70000)]
    state = ops.lz77_state(1, 60, device)
    ops.lz77_append(state, tokens[:, :6], None, 70000)
    for first in range(6, 60, piece):
        phrases, _ = ops.lz77_append(state, tokens[:, first : min(60, first + piece)], None, 256)
        assert phrases.item() == want[min(60, first + piece)]


def test_one_token_vocabulary(device):
    assert feed(device, [0] * 9, vocab_size=1) == [expected([0] * 9, 1)[-1]]


def test_tracker(device):
    tracker = Lz77Tracker(2, 30, 5, device)
    tokens = torch.randint(0, 5, (2, 30), device=device)
    tracker.append(tokens[:, :10])
    counts = torch.tensor([20, 3], dtype=torch.int32, device=device)
    phrases, bits = tracker.append(tokens[:, 10:], counts)
    want = [expected(tokens[0].tolist(), 5)[-1], expected(tokens[1, :13].tolist(), 5)[-1]]
    assert list(zip(phrases.tolist(), bits.tolist(), strict=True)) == want


@pytest.mark.parametrize("name", SEQUENCES)
def test_states_move_between_devices(device, name):
    """What one backend left, the other goes on with; also in the midst of a phrase."""
    tokens, other = SEQUENCES[name], "cpu" if device == "cuda" else device
    want = expected(tokens)
    for pieces in ([1], [40], [1, 20, 1, 30]):
        state, place, turn = ops.lz77_state(1, len(tokens), other), 0, 0
        while place < len(tokens):
            part = torch.tensor([tokens[place : place + pieces[turn % len(pieces)]]], device=state.device)
            place += part.size(1)
            assert sizes_of(ops.lz77_append(state, part, None, VOCAB)) == [want[place]]
            turn += 1
            if turn % 2:
                state = state.to(device if state.device.type == other else other)


def test_a_million_tokens(device):
    n = 1 << 20
    tokens = torch.randint(0, 1000, (1, n), generator=torch.Generator().manual_seed(0), dtype=torch.int32)
    tokens[0, n // 2 :] = tokens[0, 77 : 77 + n // 2].clone()
    phrases, bits = _C.lz77_trace(tokens[0].numpy(), 1000)
    tokens, state = tokens.to(device), ops.lz77_state(1, n + 1, device)
    assert sizes_of(ops.lz77_append(state, tokens[:, :-3], None, 1000)) == [(phrases[-4], bits[-4])]
    for i in (-3, -2):
        assert sizes_of(ops.lz77_append(state, tokens[:, i : i + 1], None, 1000)) == [(phrases[i], bits[i])]
    assert sizes_of(ops.lz77_append(state, tokens[:, -1:], None, 1000)) == [(phrases[-1], bits[-1])]


def int32(values, device="cpu"):
    return torch.tensor(values, dtype=torch.int32, device=device)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tokens": int32([[1, 2], [1, -3]])}, r"tokens: expected 0 to 99 at token 1 of sequence 1, got -3"),
        ({"tokens": int32([[100, 2], [1, 2]])}, r"tokens: expected 0 to 99 at token 0 of sequence 0, got 100"),
        (
            {"tokens": torch.tensor([[1, 2], [1, 2**32 + 1]])},
            r"tokens: expected 0 to 99 at token 1 of sequence 1, got 4294967297",
        ),
        ({"tokens": int32([[1, 2]])}, r"tokens: expected shape \[batch, max_tokens\] = \[2, \*\], got \[1, 2\]"),
        ({"tokens": int32([1, 2])}, r"tokens: expected shape"),
        ({"tokens": int32([[1, 1], [2, 2]]).T}, r"tokens: expected a contiguous last dimension"),
        ({"tokens": torch.zeros(2, 2)}, r"tokens: expected dtype int32 or int64"),
        ({"tokens": int32([[0] * 7] * 2)}, r"state: expected room for 11 tokens of sequence 0, got a capacity of 10"),
        ({"counts": int32([3, 0])}, r"counts: expected 0 to 2 tokens for sequence 0, got 3"),
        ({"counts": int32([0, -1])}, r"counts: expected 0 to 2 tokens for sequence 1, got -1"),
        ({"counts": int32([1])}, r"counts: expected shape \[batch\] = \[2\], got \[1\]"),
        ({"counts": torch.tensor([1, 1])}, r"counts: expected Int, got Long"),
        ({"counts": int32([1, 9, 1, 9])[::2]}, r"counts: expected a contiguous tensor"),
        ({"vocab_size": 0}, r"vocab_size: expected 1 to 2147483647, got 0"),
        ({"vocab_size": 2**31}, r"vocab_size: expected 1 to 2147483647"),
    ],
)
def test_bad_input_changes_nothing(change, message):
    state = ops.lz77_state(2, 10)
    ops.lz77_append(state, int32([[1, 2, 1, 2]] * 2), None, 100)
    before = state.clone()
    arguments = {"tokens": int32([[1, 2], [3, 4]]), "counts": None, "vocab_size": 100} | change
    with pytest.raises(RuntimeError, match=f"lil::lz77_append: {message}"):
        ops.lz77_append(state, **arguments)
    assert torch.equal(state, before)


@pytest.mark.parametrize(
    ("state", "message"),
    [
        (torch.zeros(2, 160), r"state: expected Int, got Float"),
        (torch.zeros(2, 31, dtype=torch.int32), r"state: expected a state_size of at least 32"),
        (torch.zeros(160, dtype=torch.int32), r"state: expected shape"),
        (torch.zeros(2, 320, dtype=torch.int32)[:, :160], r"state: expected a contiguous tensor"),
        (torch.full((2, 160), -1, dtype=torch.int32), r"state: expected rows of lil_ops.lz77_state.* in row 0"),
        (torch.full((2, 160), 3, dtype=torch.int32), r"state: expected rows of lil_ops.lz77_state"),
        (torch.eye(2, 160, dtype=torch.int32), r"state: expected rows of lil_ops.lz77_state"),
    ],
)
def test_bad_state(state, message):
    before = state.clone()
    with pytest.raises(RuntimeError, match=message):
        ops.lz77_append(state, int32([[1], [1]]), None, 100)
    assert torch.equal(state, before)


def test_damaged_header_is_seen():
    """Any one header word out of its range, or a row of another size, is refused and not followed."""
    state = ops.lz77_state(1, 20)
    ops.lz77_append(state, int32([[0, 1, 2, 0, 1, 2, 3, 3]]), None, 100)
    for word, value in itertools.product(range(8), (-1, 10**9, -(2**31))):
        damaged = state.clone()
        damaged[0, word] = value
        if (word, value) == (6, 10**9):  # a size in bits has no bound that is cheap to know
            continue
        with pytest.raises(RuntimeError, match=r"rows of lil_ops\.lz77_state"):
            ops.lz77_append(damaged, int32([[1]]), None, 100)
    with pytest.raises(RuntimeError, match=r"rows of lil_ops\.lz77_state"):
        ops.lz77_append(state[:, : 16 * 15].contiguous(), int32([[1]]), None, 100)


BAD = {
    r"tokens: expected 0 to 99 (at|for)": lambda a: a["tokens"][1, 1].fill_(-3),
    r"tokens: expected 0 to 99 .*, got": lambda a: a["tokens"][1, 0].fill_(2**32 + 1),
    r"counts: expected 0 to \d+ tokens for sequence 1, got -1": lambda a: a["counts"][1].fill_(-1),
    r"counts: expected 0 to \d+ tokens for sequence 1": lambda a: a["counts"][1].fill_(2**31 - 1),
    r"state: expected": lambda a: a["state"][1].fill_(-1),
    r"state: expected (rows|a row) of lil_ops.lz77_state": lambda a: a["state"][1, 4].fill_(10**9),
}


@pytest.mark.parametrize("width", [3, 30])
@pytest.mark.parametrize("message", [*BAD, "state: expected .*room for|state: expected a capacity"])
def test_a_bad_row_stays_as_it_was(device, message, width):
    """On CUDA the others are done, and its result is its size; on the CPU nothing is done."""
    capacity = 40 if message in BAD else 10 + width
    state = ops.lz77_state(3, capacity, device)
    sizes = ops.lz77_append(state, torch.randint(0, 100, (3, 9), device=device), int32([9, 9, 0], device), 100)
    tokens = torch.randint(0, 2, (3, width), device=device)
    arguments = {"state": state, "tokens": tokens, "counts": int32([2, width, 1], device), "vocab_size": 100}
    if message in BAD:
        BAD[message](arguments)
    else:
        ops.lz77_append(state, tokens[:, :2], int32([0, 2, 0], device), 100)
        sizes = ops.lz77_append(state, tokens[:, :0], None, 100)
    before, good = (
        state.clone(),
        ops.lz77_append(state[::2].clone(), tokens[::2], arguments["counts"][::2].clone(), 100),
    )
    with pytest.raises(RuntimeError, match=f"lil::lz77_append: {message}"):
        got = ops.lz77_append(**arguments)
        if device != "cpu":
            assert torch.equal(state[1], before[1])
            assert sizes_of(got)[::2] == sizes_of(good)
            assert sizes_of(got)[1] == (
                (0, 0) if "state: expected" in message and message in BAD else sizes_of(sizes)[1]
            )
        lil_ops.check_errors()
    if device == "cpu":
        assert torch.equal(state, before)
    else:
        lil_ops.check_errors()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_replayed_in_a_graph():
    """Steps of one token and of many, each a graph; nothing waits for the device."""
    tokens = torch.randint(0, 3, (4, 500), generator=torch.Generator().manual_seed(5))
    want = [brute_force(row, 3) for row in tokens.tolist()]
    tokens = tokens.cuda()
    for width in (1, 50):
        state, part = ops.lz77_state(4, 500, "cuda"), torch.zeros(4, width, dtype=torch.int64, device="cuda")
        counts = torch.zeros(4, dtype=torch.int32, device="cuda")
        ops.lz77_append(state, part, counts, 3)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            sizes = ops.lz77_append(state, part, counts, 3)
        counts += width
        torch.cuda.set_sync_debug_mode("error")
        try:
            for first in range(0, 500, width):
                part.copy_(tokens[:, first : first + width])
                graph.replay()
                eager = ops.lz77_append(state, part, torch.zeros_like(counts), 3)
                if first % 100 == 0:
                    torch.cuda.set_sync_debug_mode("default")
                    assert sizes_of(sizes) == sizes_of(eager) == [row[first + width] for row in want]
                    torch.cuda.set_sync_debug_mode("error")
        finally:
            torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("capacity", [0, -1, 2**24 + 1])
def test_state_capacity_out_of_range(capacity):
    with pytest.raises(ValueError, match=rf"lz77_state: capacity: expected 1 to 16777216 tokens, got {capacity}"):
        ops.lz77_state(1, capacity)


def test_trace_of_nothing_and_of_strided_input():
    phrases, bits = _C.lz77_trace(np.array([], np.int64), 10)
    assert phrases.shape == bits.shape == (0,)
    tokens = np.arange(40) % 7
    assert _C.lz77_trace(tokens[::3], 10)[0].tolist() == lz77_sizes(tokens[::3].tolist(), 10)[0]


@pytest.mark.parametrize(
    ("tokens", "vocab_size", "message"),
    [
        (np.zeros((2, 2), np.int64), 10, "tokens: expected one dimension, got 2"),
        (np.zeros(3), 10, "tokens: expected dtype int32 or int64, got float64"),
        (np.array([1, 10]), 10, "tokens: expected 0 to 9 at index 1, got 10"),
        (np.array([-1]), 10, "tokens: expected 0 to 9 at index 0, got -1"),
        (np.array([0]), 0, "vocab_size: expected 1 to 2147483647, got 0"),
    ],
)
def test_trace_bad_input(tokens, vocab_size, message):
    with pytest.raises(ValueError, match=f"lz77_trace: {message}"):
        _C.lz77_trace(tokens, vocab_size)


def test_opcheck(device):
    for counts in (None, int32([2, 0, 3], device)):
        tokens = torch.randint(0, 9, (3, 4), device=device)
        torch.library.opcheck(torch.ops.lil.lz77_append.default, (ops.lz77_state(3, 20, device), tokens, counts, 9))


def test_compile(device):
    @torch.compile(fullgraph=True)
    def step(state, tokens):
        phrases, bits = ops.lz77_append(state, tokens % 5, None, 5)
        return phrases + 1, bits

    eager, compiled = ops.lz77_state(2, 20, device), ops.lz77_state(2, 20, device)
    for seed in range(3):
        tokens = torch.randint(0, 50, (2, 4), generator=torch.Generator().manual_seed(seed)).to(device)
        phrases, bits = ops.lz77_append(eager, tokens % 5, None, 5)
        actual = step(compiled, tokens)
        assert torch.equal(actual[0], phrases + 1) and torch.equal(actual[1], bits)
    assert torch.equal(eager, compiled)

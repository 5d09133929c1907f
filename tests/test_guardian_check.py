import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lil_ops import ops
from lil_ops.guardian import Guardian
from lil_ops.reference.guardian_check import guardian_check as reference_guardian_check
from lil_ops.stopping import Lz77Tracker, Progress, StopReason

OPERATORS = ["guardian_check", "lz77_append"]
NAMES = ["sizes", "num_tokens", "interval", "threshold", "checkpoint", "gain", "stop"]


def tensors(device, sizes, num_tokens, interval, threshold, checkpoint=None, gain=None, stop=None):
    batch = len(sizes)
    columns = [sizes, num_tokens, interval, threshold, checkpoint or [[0, 0]] * batch, gain or [-1] * batch]
    columns.append(stop or [0] * batch)
    shapes = [(batch, 2) if name == "checkpoint" else (batch,) for name in NAMES]
    dtypes = [torch.float32 if name == "threshold" else torch.int32 for name in NAMES]
    return [
        torch.tensor(column, dtype=dtype, device=device).view(shape)
        for column, dtype, shape in zip(columns, dtypes, shapes, strict=True)
    ]


def test_codes():
    assert [(reason.name, reason.value) for reason in StopReason] == [
        ("RUNNING", 0),
        ("EOS", 1),
        ("LENGTH", 2),
        ("GUARDIAN", 3),
    ]


ints, small = st.integers(-(2**20), 2**20), st.integers(-2, 12)
row = st.tuples(small, small, small, st.one_of(small, st.floats(-3, 15, width=32)), st.tuples(small, small), ints)


@settings(max_examples=200, deadline=None)
@given(rows=st.lists(st.tuples(row, st.sampled_from([0, 0, 0, 1, 2, 3, 9])), max_size=20))
def test_definition(device, rows):
    columns = zip(*(one for one, _ in rows), strict=True) if rows else [[]] * 6
    arguments = tensors(device, *map(list, columns), stop=[stop for _, stop in rows])
    expected = reference_guardian_check(*(a.cpu() for a in arguments))
    inputs = [a.clone() for a in arguments[:4]]
    assert ops.guardian_check(*arguments) is None
    for actual, want in zip(arguments, [*inputs, *expected], strict=True):
        assert torch.equal(actual.cpu(), want.cpu())


def test_gain_below_the_threshold_stops_and_gain_at_it_does_not(device):
    arguments = tensors(device, [19, 20, 21, 20, 20], [250] * 5, [250] * 5, [20, 20, 20, 20.5, float("nan")])
    ops.guardian_check(*arguments)
    assert arguments[6].tolist() == [StopReason.GUARDIAN, 0, 0, StopReason.GUARDIAN, 0]
    assert arguments[5].tolist() == [19, 20, 21, 20, 20]


def test_only_at_interval_ends(device):
    checkpoint, gain, stop = tensors(device, [0], [0], [0], [0])[4:]
    for tokens in range(1, 41):
        sizes, num_tokens, interval, threshold = tensors(device, [tokens // 2], [tokens], [10], [3])[:4]
        ops.guardian_check(sizes, num_tokens, interval, threshold, checkpoint, gain, stop)
        assert checkpoint.tolist() == [[tokens // 10 * 10, tokens // 10 * 5]]
        assert gain.item() == (5 if tokens >= 10 else -1) and stop.item() == 0


def test_each_sequence_has_its_own_interval_and_threshold(device):
    arguments = tensors(device, [4] * 6, [10] * 6, [10, 11, 5, 0, -1, 10], [5, 5, 4, 5, 5, 0])
    ops.guardian_check(*arguments)
    assert arguments[6].tolist() == [3, 0, 0, 0, 0, 0]
    assert arguments[5].tolist() == [4, -1, 4, -1, -1, 4]


def test_stopped_sequences_are_left_alone(device):
    arguments = tensors(device, [1] * 4, [500] * 4, [10] * 4, [9] * 4, [[5, 1]] * 4, [7] * 4, [1, 2, 3, 77])
    before = [a.clone() for a in arguments]
    ops.guardian_check(*arguments)
    assert all(torch.equal(a, b) for a, b in zip(arguments, before, strict=True))


@pytest.mark.parametrize("batch", [0, 1, 1000])
def test_batches(device, batch):
    arguments = tensors(device, [3] * batch, [8] * batch, [8] * batch, [4] * batch)
    ops.guardian_check(*arguments)
    assert arguments[6].tolist() == [3] * batch and arguments[4].tolist() == [[8, 3]] * batch


def test_published_rule_over_a_sequence(device):
    """Random tokens, then one phrase for ever: stopped at the first interval that lies in the loop."""
    guardian, batch = Guardian(interval=50, threshold=4), 3
    lead = torch.randint(0, 1000, (batch, 300), generator=torch.Generator().manual_seed(0))
    loop = torch.arange(7).repeat(batch, 100)
    starts = [0, 120, 230]
    rows = torch.stack([torch.cat([lead[b, :start], loop[b]])[:400] for b, start in enumerate(starts)])
    tracker, state = Lz77Tracker(batch, 400, 1000, device), guardian.start(batch, device)
    stop = torch.zeros(batch, dtype=torch.int32, device=device)
    stopped_at = [None] * batch
    for step in range(400):
        phrases, bits = tracker.append(rows[:, step : step + 1].to(device))
        num_tokens = torch.full((batch,), step + 1, dtype=torch.int32, device=device)
        newest = rows[:, step].to(device)
        state.check(Progress(newest, phrases, bits, num_tokens, stop == 0, None, stop))
        stopped_at = [at or (step + 1 if code else None) for at, code in zip(stopped_at, stop.tolist(), strict=True)]
    assert stopped_at == [100, 200, 300]
    assert state.checkpoint[:, 0].tolist() == stopped_at and (state.gain < 4).all()


def test_state_of_a_guardian(device):
    state = Guardian().start(2, device)
    assert state.interval.tolist() == [250, 250] and state.threshold.tolist() == [20, 20]
    assert state.checkpoint.tolist() == [[0, 0]] * 2 and state.gain.tolist() == [-1, -1]
    assert [t.dtype for t in (state.interval, state.threshold, state.checkpoint, state.gain)] == [
        torch.int32,
        torch.float32,
        torch.int32,
        torch.int32,
    ]
    assert all(t.device.type == device for t in (state.interval, state.threshold, state.checkpoint, state.gain))


@pytest.mark.parametrize(("unit", "stopped"), [("phrases", 3), ("bits", 0)])
def test_unit(device, unit, stopped):
    state = Guardian(interval=10, threshold=5, unit=unit).start(1, device)
    phrases, bits, num_tokens, stop = (torch.tensor([n], dtype=torch.int32, device=device) for n in (4, 90, 10, 0))
    state.check(Progress(num_tokens.long(), phrases, bits, num_tokens, stop == 0, None, stop))
    assert stop.item() == stopped and state.gain.item() == (4 if unit == "phrases" else 90)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"interval": 0}, "Guardian: interval: expected a whole number from 1 to .*, got 0"),
        ({"interval": 2.5}, "Guardian: interval"),
        ({"interval": True}, "Guardian: interval"),
        ({"interval": 2**31}, "Guardian: interval"),
        ({"threshold": -1}, "Guardian: threshold: expected a number, 0 or more, that float32 has, got -1"),
        ({"threshold": float("nan")}, "Guardian: threshold"),
        ({"threshold": "20"}, "Guardian: threshold: expected a number, 0 or more, that float32 has, got '20'"),
        ({"loss_weight": -1.0}, "Guardian: loss_weight: expected a number, 0 or more, that float32 has, got -1"),
        ({"unit": "bytes"}, "Guardian: unit: expected one of phrases, bits, got 'bytes'"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        Guardian(**options)


def test_a_guardian_does_not_change():
    with pytest.raises(dataclasses.FrozenInstanceError):
        Guardian().interval = 3


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("kind", ["shape", "dtype", "stride", "device"])
def test_bad_input_changes_nothing(device, name, kind):
    arguments = dict(zip(NAMES, tensors(device, [1, 1], [9, 9], [3, 3], [5, 5]), strict=True))
    good = arguments[name]
    if kind == "shape":
        arguments[name] = good[None]
    elif kind == "dtype":
        arguments[name] = good.long()
    elif kind == "device":
        if device == "cpu" or name == "sizes":
            pytest.skip("needs another device than that of sizes")
        arguments[name] = good.cpu()
    else:
        arguments[name] = good.repeat_interleave(2, -1)[..., ::2]
    before = {key: value.clone() for key, value in arguments.items()}
    with pytest.raises(RuntimeError, match=rf"lil::guardian_check: {name}: expected .*, got "):
        ops.guardian_check(**arguments)
    assert all(torch.equal(value, before[key]) for key, value in arguments.items())


def test_batches_must_agree(device):
    arguments = tensors(device, [1, 1], [9, 9], [3, 3], [5, 5])
    arguments[6] = arguments[6][:1]
    with pytest.raises(RuntimeError, match=r"lil::guardian_check: stop: expected shape \[batch\] = \[2\], got \[1\]"):
        ops.guardian_check(*arguments)


def test_opcheck(device):
    arguments = tensors(device, [3, 50], [250, 250], [250, 250], [20, 20])
    torch.library.opcheck(torch.ops.lil.guardian_check.default, arguments)


def test_compile(device):
    @torch.compile(fullgraph=True)
    def step(sizes, *rest):
        ops.guardian_check(sizes * 2, *rest)
        return rest[-1] == StopReason.GUARDIAN.value  # Dynamo compares a tensor with an enum by identity

    arguments = tensors(device, [3, 50], [250, 250], [250, 250], [20, 20])
    assert step(*arguments).tolist() == [True, False]
    assert arguments[5].tolist() == [6, 100] and arguments[4].tolist() == [[250, 6], [250, 100]]

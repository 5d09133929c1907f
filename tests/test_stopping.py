"""Stop rules: on one stream, on batches, with lost information, and in transformers' generate."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import build, prompts

from lil_ops import DecodeLoop, Guardian, Repetition, StopRuleCriteria, TokenBudget, generate
from lil_ops.policies import Quest
from lil_ops.reference.lz77_append import lz77_sizes
from lil_ops.stopping import Progress, StopReason


def published(tokens, interval, threshold, unit=0):
    """Where the published rule ends the stream."""
    sizes, then = lz77_sizes(tokens, 2**31 - 1)[unit], 0
    for end in range(interval, len(tokens) + 1, interval):
        if sizes[end - 1] - then < threshold:
            return end
        then = sizes[end - 1]
    return None


streams = st.lists(st.integers(0, 3), max_size=80)


@settings(max_examples=60, deadline=None)
@given(streams, st.integers(1, 20), st.integers(0, 6), st.integers(0, 80))
def test_a_guardian_on_a_stream(tokens, interval, threshold, split):
    watch = Guardian(interval=interval, threshold=threshold).feed(tokens[:split])
    assert watch.feed(tokens[split:]) is watch
    assert watch.stopped_at == published(tokens, interval, threshold)
    seen = tokens[: watch.num_tokens]
    assert watch.num_tokens == (watch.stopped_at or len(tokens))
    if seen:
        sizes = lz77_sizes(seen, 2**31 - 1)
        assert (watch.phrases, watch.bits) == (sizes[0][-1], sizes[1][-1])


def test_a_long_stream_and_its_gains():
    tokens = torch.randint(0, 500, (3000,), generator=torch.Generator().manual_seed(0)).tolist()
    watch = Guardian(interval=1000, threshold=20).feed(tokens, vocab_size=500).feed([7] * 5000)
    assert watch.stopped_at == 4000 and len(watch.gains) == 4 and watch.gains[-1] < 20
    assert sum(watch.gains) == watch.phrases


def repeats(tokens, rule):
    """Where the rule ends the stream, by its definition."""
    for end in range(1, len(tokens) + 1):
        for n in range(rule.min_pattern, rule.max_pattern + 1):
            tail = tokens[:end][-n * rule.count :]
            if len(tail) == n * rule.count and tail == tail[:n] * rule.count:
                return end
    return None


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(0, 1), max_size=60), st.integers(1, 4), st.integers(0, 4), st.integers(2, 4))
def test_repetition(tokens, least, more, count):
    rule = Repetition(max_pattern=least + more, min_pattern=least, count=count)
    assert rule.feed(tokens).stopped_at == repeats(tokens, rule)


def test_gains_of_single_tokens():
    watch = Guardian(1, 0).feed([1, 2, 1, 2])
    assert len(watch.gains) == 4 and sum(watch.gains) == watch.phrases
    assert TokenBudget(5).feed(range(4)).gains == []


def test_a_token_budget():
    assert TokenBudget(5).feed(range(9)).stopped_at == 5 and TokenBudget(5).feed(range(4)).stopped_at is None


@pytest.mark.parametrize("rule", [Guardian(4, 2), Repetition(4, 1, 3), TokenBudget(9), Guardian(4, 2, loss_aware=True)])
def test_a_batch_is_its_sequences_and_a_place_can_be_used_again(rule):
    generator = torch.Generator().manual_seed(1)
    rows = torch.randint(0, 3, (6, 40), generator=generator)
    batch = len(rows)
    state, stop = rule.start(batch), torch.zeros(batch, dtype=torch.int32)
    sizes = [lz77_sizes(row.tolist(), 3) for row in rows]
    alone = [rule.feed(row.tolist()).stopped_at for row in rows]
    assert len(set(alone)) > 1 or isinstance(rule, TokenBudget)
    for turn in range(2):
        for end in range(1, 41):
            phrases, bits = (torch.tensor([s[unit][end - 1] for s in sizes], dtype=torch.int32) for unit in (0, 1))
            count = torch.full((batch,), end, dtype=torch.int32)
            state.check(Progress(rows[:, end - 1], phrases, bits, count, stop == 0, torch.zeros(batch), stop))
            assert stop.tolist() == [StopReason.GUARDIAN if at and at <= end else 0 for at in alone], (turn, end)
        for row in range(batch):
            state.reset(row)
        stop.zero_()


def test_a_sequence_that_has_stopped_keeps_its_reason():
    for rule in (Repetition(2, 1, 2), TokenBudget(1)):
        state, stop = rule.start(1), torch.tensor([StopReason.EOS], dtype=torch.int32)
        for _ in range(4):
            one = torch.ones(1, dtype=torch.int32)
            state.check(Progress(torch.tensor([5]), one, one, one, stop == 0, None, stop))
        assert stop.item() == StopReason.EOS


@pytest.mark.parametrize(("unit", "lost", "stops"), [
    ("bits", 0.0, False), ("bits", 9.8, False), ("bits", 10.1, True), ("phrases", 4.9, False), ("phrases", 5.1, True),
])  # fmt: skip
def test_lost_bits_count_against_the_gain(unit, lost, stops):
    """Ten steps bring 10 phrases of 10 bits each. A threshold of half leaves 50 bits, or 5 phrases, to be lost."""
    threshold = {"bits": 1.0, "phrases": 5.0}[unit]
    state = Guardian(interval=10, threshold=threshold, unit=unit, loss_aware=True, loss_weight=1.0).start(1)
    stop = torch.zeros(1, dtype=torch.int32)
    for end in range(1, 11):
        phrases, bits, count = (torch.tensor([n * end], dtype=torch.int32) for n in (1, 10, 1))
        per_step = lost if unit == "bits" else lost * 10 / 10
        state.check(Progress(torch.tensor([end]), phrases, bits, count, stop == 0, torch.tensor([per_step]), stop))
    # The floor takes up to one from the size, and bits come in tens.
    expected = {"bits": 10 * (10 - lost), "phrases": 10 - lost}[unit]
    assert state.gain.item() == pytest.approx(expected, abs=1.01)
    assert bool(stop) == stops


def test_a_loss_aware_guardian_where_nothing_is_lost_is_the_published_one():
    model, sequences = build("llama"), prompts(20, 9)
    options = {"max_new_tokens": 60, "policy": "quest", "budget": 1024, "dense_layers": 0}
    runs = [
        generate(model, sequences, guardian=Guardian(10, 8, loss_aware=aware), **options).tokens
        for aware in (False, True)
    ]
    assert runs[0] == runs[1]
    sparse = {**options, "budget": 32, "scoring": "meanstd"}
    runs = [
        generate(model, sequences, guardian=Guardian(10, 5, loss_aware=True, loss_weight=weight), **sparse)
        for weight in (0.0, 1e3)
    ]
    assert [len(tokens) for tokens in runs[1].tokens] < [len(tokens) for tokens in runs[0].tokens]


@pytest.mark.parametrize(("aware", "options", "scoring", "sink"), [
    (True, {"policy": "quest", "budget": 32}, "meanstd", 1),
    (True, {"policy": "quest", "budget": 32, "scoring": "minmax", "sink": 0}, "minmax", 0),
    (True, {"policy": Quest(32)}, "minmax", 0),
    (False, {"policy": "quest", "budget": 32}, "minmax", 0),
])  # fmt: skip
def test_a_loss_aware_rule_has_an_estimate_of_the_loss_unless_told_otherwise(aware, options, scoring, sink):
    loop = DecodeLoop(build("llama"), prompts(9), guardian=Guardian(loss_aware=aware), **options)
    assert (loop.cache.policy.summary_mode, loop.cache.policy.sink) == (scoring, sink)


def test_a_policy_that_cannot_tell_its_loss():
    with pytest.raises(ValueError, match="policy sink cannot tell its information loss"):
        generate(build("llama"), prompts(9), policy="sink", budget=32, guardian=Guardian(loss_aware=True))


def test_in_transformers_generate():
    model, ids = build("llama"), torch.stack(prompts(12, 12))
    rule = Guardian(interval=8, threshold=6)
    criteria = StopRuleCriteria(rule, prompt_length=12, vocab_size=model.config.vocab_size)
    model.generation_config.pad_token_id = 0
    out = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=64, do_sample=False, stopping_criteria=[criteria]
    )
    ours = generate(model, list(ids), guardian=rule, max_new_tokens=64)
    # Without an end-of-sequence token transformers goes on with a row until all have stopped.
    for row, tokens in zip(out[:, 12:].tolist(), ours.tokens, strict=True):
        assert row[: len(tokens)] == tokens and len(row) == max(map(len, ours.tokens)) < 64
    for again in (ids, torch.stack(prompts(90))):  # what it has seen is not what this call has generated
        with pytest.raises(ValueError, match="expected to be used for one call of generate"):
            model.generate(again, attention_mask=torch.ones_like(again), max_new_tokens=2, stopping_criteria=[criteria])
    with pytest.raises(ValueError, match="information loss"):
        StopRuleCriteria(Guardian(loss_aware=True), prompt_length=3)


def test_options_and_tokens_may_be_numpys():
    assert TokenBudget(np.int64(3)).feed(np.arange(9)).stopped_at == 3
    with pytest.raises(TypeError):
        TokenBudget(3).feed([1.5])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Repetition(count=1), "Repetition: count: expected a whole number from 2 to .*, got 1"),
        (lambda: Repetition(count=2**62), "Repetition: count: expected a whole number from 2 to"),
        (lambda: Repetition(min_pattern=0), "Repetition: min_pattern"),
        (lambda: Repetition(max_pattern=2, min_pattern=3), "Repetition: max_pattern: .* from 3 to .*, got 2"),
        (lambda: TokenBudget(0), "TokenBudget: tokens: expected a whole number from 1 to"),
        (lambda: TokenBudget(2**31), "TokenBudget: tokens: expected a whole number from 1 to"),
        (lambda: Guardian(3, 1e39), "Guardian: threshold: expected a number, 0 or more, that float32 has, got 1e"),
        (lambda: TokenBudget(True), "TokenBudget: tokens"),
    ],
)
def test_bad_options(make, message):
    with pytest.raises(ValueError, match=message):
        make()

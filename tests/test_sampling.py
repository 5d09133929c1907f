"""`sample`: greedy, temperature, top-k, top-p, and independence of the batch."""

from fractions import Fraction

import numpy as np
import pytest
import torch

from lil_ops.sampling import PARTS, most_likely, sample


def uniforms(count: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(count, generator=torch.Generator().manual_seed(seed))


def frequencies(logits: torch.Tensor, draws: int = 200_000, **options) -> torch.Tensor:
    """Observed frequency of each token of one distribution ``logits [vocab]``."""
    tokens = sample(logits.expand(draws, -1), uniforms(draws), **options)
    return torch.bincount(tokens, minlength=len(logits)) / draws


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_greedy_takes_the_first_largest_logit(dtype):
    logits = torch.tensor([[0, 3, 1, 3], [5, 1, 1, 1]], dtype=dtype)
    tokens = sample(logits, uniforms(2))
    assert tokens.tolist() == [1, 0] and tokens.dtype == torch.int64


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("vocab", [1, 7, PARTS, PARTS + 1, 10 * PARTS, 49_157])
def test_most_likely_is_argmax(dtype, vocab):
    """In bfloat16 the largest logit is there several times; a row may have no number, or infinities alone."""
    logits = torch.randn(6, vocab, generator=torch.Generator().manual_seed(vocab)).to(dtype)
    logits[1:4, vocab // 2], logits[4] = torch.tensor([torch.inf, torch.nan, -torch.inf]).to(dtype), -torch.inf
    logits[5] = 0
    assert torch.equal(most_likely(logits), logits.argmax(-1))
    assert torch.equal(most_likely(logits[:0]), logits[:0].argmax(-1))


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_frequencies_are_the_softmax(temperature):
    logits = torch.tensor([2.0, -1.0, 0.5, 1.0, 0.0])
    expected = (logits / temperature).softmax(-1)
    torch.testing.assert_close(frequencies(logits, temperature=temperature), expected, atol=5e-3, rtol=0)


@pytest.mark.parametrize("options", [{}, {"top_k": 2}, {"top_p": 0.9}])
def test_the_lowest_temperature_takes_the_largest_logit(options):
    logits = torch.randn(99, 20, generator=torch.Generator().manual_seed(4)) * 50
    tokens = sample(logits, uniforms(99), torch.finfo(torch.float32).tiny, **options)
    assert torch.equal(tokens, logits.argmax(-1))


def test_top_k_keeps_the_k_largest():
    logits = torch.tensor([2.0, -1.0, 0.5, 1.0, 0.0])
    expected = logits.masked_fill(logits < 1.0, -torch.inf).softmax(-1)
    torch.testing.assert_close(frequencies(logits, temperature=1.0, top_k=2), expected, atol=5e-3, rtol=0)
    everything = sample(logits.expand(99, -1), uniforms(99), 1.0, top_k=99)
    assert torch.equal(everything, sample(logits.expand(99, -1), uniforms(99), 1.0))


@pytest.mark.parametrize(
    ("top_p", "kept"), [(0.05, 1), (0.49, 1), (0.6, 2), (0.79, 2), (0.85, 3), (0.999, 5), (1.0, 5)]
)
def test_top_p_keeps_the_fewest_tokens_that_reach_it(top_p, kept):
    probabilities = torch.tensor([0.04, 0.5, 0.1, 0.3, 0.06])
    found = frequencies(probabilities.log(), temperature=1.0, top_p=top_p)
    order = probabilities.argsort(descending=True)[:kept]
    expected = torch.zeros(5).index_copy(0, order, probabilities[order])
    torch.testing.assert_close(found, expected / expected.sum(), atol=5e-3, rtol=0)


def test_top_k_then_top_p():
    probabilities = torch.tensor([0.4, 0.3, 0.2, 0.1])
    found = frequencies(probabilities.log(), temperature=1.0, top_k=3, top_p=0.5)
    torch.testing.assert_close(found, torch.tensor([4 / 7, 3 / 7, 0, 0]), atol=5e-3, rtol=0)


@pytest.mark.parametrize("options", [{}, {"top_k": 7}, {"top_p": 0.9}, {"top_k": 50, "top_p": 0.7}])
def test_a_row_does_not_depend_on_the_batch(options):
    logits, numbers = torch.randn(16, 1000, generator=torch.Generator().manual_seed(3)), uniforms(16)
    together = sample(logits, numbers, 0.8, **options)
    alone = torch.cat([sample(logits[i : i + 1], numbers[i : i + 1], 0.8, **options) for i in range(16)])
    assert torch.equal(together, alone)


@pytest.mark.parametrize("options", [{}, {"top_k": 3}, {"top_p": 0.99}])
def test_the_ends_of_the_unit_interval_choose_possible_tokens(options):
    logits = torch.tensor([[-torch.inf, 0.0, 1.0, -torch.inf]]).expand(2, -1)
    numbers = torch.tensor([0.0, 1 - 2**-53], dtype=torch.float64)
    assert set(sample(logits, numbers, 1.0, **options).tolist()) == {1, 2}


def test_rows_of_a_large_vocabulary_and_none():
    assert sample(torch.zeros(0, 10), torch.zeros(0), 1.0).shape == (0,)
    tokens = sample(torch.zeros(1000, 150_000), uniforms(1000), 1.0)
    assert tokens.min() >= 0 and tokens.max() < 150_000 and tokens.unique().numel() > 980


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": -0.1}, "temperature: expected"),
        ({"temperature": float("nan")}, "temperature: expected"),
        ({"temperature": float("inf")}, "temperature: expected"),
        ({"temperature": 1e-38}, r"temperature: expected 0 \(greedy\) or a number from 1.1754944e-38 to .* got 1e-38"),
        ({"temperature": 1e39}, "temperature: expected .* to 3.4028235e.38, got 1e"),
        ({"temperature": 2**128}, "temperature: expected"),
        ({"temperature": np.bool_(True)}, "temperature: expected"),
        ({"temperature": "0.7"}, "temperature: expected .* got '0.7'"),
        ({"temperature": True}, "temperature: expected .* got True"),
        ({"top_k": -1}, "top_k: expected"),
        ({"top_k": 2.0}, r"top_k: expected a whole number of at least 0 \(0: all tokens\), got 2.0"),
        ({"top_k": "2"}, "top_k: expected .* got '2'"),
        ({"top_p": 0.0}, "top_p: expected"),
        ({"top_p": 1.1}, "top_p: expected"),
        ({"top_p": "0.9"}, "top_p: expected a number of more than 0 and at most 1, got '0.9'"),
        ({"top_p": float("nan")}, "top_p: expected"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        sample(torch.zeros(1, 4), torch.zeros(1), **options)


def test_numbers_of_other_kinds():
    logits = torch.randn(99, 20, generator=torch.Generator().manual_seed(5))
    expected = sample(logits, uniforms(99), 0.5, 3, 0.75)
    assert torch.equal(sample(logits, uniforms(99), np.float32(0.5), np.int64(3), np.float64(0.75)), expected)
    assert torch.equal(sample(logits, uniforms(99), Fraction(1, 2), 3, Fraction(3, 4)), expected)


@pytest.mark.parametrize("temperature", [2**64, torch.finfo(torch.float32).max])
def test_a_high_temperature_draws_from_all_that_is_possible(temperature):
    logits = torch.tensor([[-torch.inf, 0.0, 5.0, -50.0]]).expand(999, -1)
    assert set(sample(logits, uniforms(999), temperature).tolist()) == {1, 2, 3}


def test_bad_tensors():
    with pytest.raises(ValueError, match="logits: expected"):
        sample(torch.zeros(4), torch.zeros(1))
    with pytest.raises(ValueError, match="logits: expected"):
        sample(torch.zeros(1, 4, dtype=torch.int64), torch.zeros(1))
    with pytest.raises(ValueError, match="uniforms: expected"):
        sample(torch.zeros(2, 4), torch.zeros(1), 1.0)

"""The decode loop: ragged batches, stops, streaming, sampling, interruption, errors."""

import numpy as np
import pytest
import torch
from tiny_models import LogitsLog, build, hf_generate, prompts

from lil_ops.decode import DecodeLoop, generate
from lil_ops.guardian import Guardian
from lil_ops.policies import Quest
from lil_ops.stopping import StopReason

NEW = 32


@pytest.fixture(scope="module")
def model():
    return build("llama")


@pytest.fixture(scope="module")
def looping():
    """A model whose every output soon repeats: it copies its input token, whatever came before."""
    model = build("llama")
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
        model.lm_head.weight.copy_(model.model.embed_tokens.weight)
    return model


@pytest.mark.parametrize("policy", [{}, {"policy": "quest", "budget": 32}, {"policy": "sink", "budget": 32}])
def test_ragged_batch_equals_solo_runs(model, policy):
    batch = prompts(3, 40, 1, 17)
    together = generate(model, batch, max_new_tokens=NEW, **policy)
    alone = [generate(model, [prompt], max_new_tokens=NEW, **policy).tokens[0] for prompt in batch]
    assert together.tokens == alone
    assert together.stop_reason == [StopReason.LENGTH] * 4


def test_result(model):
    result = generate(model, prompts(20, 5), max_new_tokens=NEW)
    assert [len(tokens) for tokens in result.tokens] == [NEW, NEW]
    assert len(result.step_times) == NEW and result.ttft == result.step_times[0] > 0
    assert result.jct == pytest.approx(result.ttft + (NEW - 1) * result.tbt)
    # 51 and 36 cached tokens: the last one is not fed back. 4 + 3 pages of 16, K and V, 4 layers, 2 heads, 64 floats.
    page = 16 * 2 * 4 * 2 * 64 * 4
    assert result.kv_bytes_peak == 7 * page and result.kv_bytes == [4 * page, 3 * page]
    for curve, phrases, ratio in zip(result.lz77, result.phrases, result.ratio, strict=True):
        assert len(curve) == NEW and (curve[1:] >= curve[:-1]).all() and curve[-1] == phrases
        assert ratio == phrases / NEW


def test_eos_ends_a_row_and_frees_its_pages(model):
    batch = prompts(20, 24)
    free_run = generate(model, batch, max_new_tokens=NEW).tokens
    at = next(i for i, token in enumerate(free_run[0]) if token not in free_run[0][:i] + free_run[1] and i > 3)
    events = []
    with LogitsLog(model) as log:
        result = generate(model, batch, max_new_tokens=NEW, eos_token_id=free_run[0][at], on_token=events.append)
    assert result.tokens == [free_run[0][: at + 1], free_run[1]]
    assert result.stop_reason == [StopReason.EOS, StopReason.LENGTH]
    assert events[at].stop == {0: StopReason.EOS} and set(events[at + 1].tokens) == {1}
    assert events[at].kv_bytes < events[at - 1].kv_bytes and events[-1].kv_bytes == 0
    assert [len(logits) for logits in log.logits] == [1, 1] + [2] * at + [1] * (NEW - 1 - at)


def test_eos_comes_from_the_generation_config(model, monkeypatch):
    prompt = prompts(20)
    tokens = generate(model, prompt, max_new_tokens=NEW).tokens[0]
    for ids in (tokens[0], [210, tokens[0]]):
        monkeypatch.setattr(model.generation_config, "eos_token_id", ids)
        assert generate(model, prompt, max_new_tokens=NEW).stop_reason == [StopReason.EOS]
        assert generate(model, prompt, max_new_tokens=NEW, eos_token_id=()).tokens[0] == tokens


def test_guardian_stops_a_loop(looping):
    events = []
    guardian = Guardian(interval=16, threshold=4)
    result = generate(looping, prompts(5, 9), max_new_tokens=100, guardian=guardian, on_token=events.append)
    assert result.stop_reason == [StopReason.GUARDIAN] * 2 and len(result.tokens[0]) in (16, 32)
    last = events[-1]
    assert last.stop == dict.fromkeys((0, 1), StopReason.GUARDIAN) and max(last.gain.values()) < 4
    assert last.phrases == dict(enumerate(result.phrases))
    free = generate(looping, prompts(5, 9), max_new_tokens=100)
    assert [tokens[: len(result.tokens[0])] for tokens in free.tokens] == result.tokens


def test_guardian_lets_new_information_pass(model):
    result = generate(model, prompts(20), max_new_tokens=NEW, guardian=Guardian(interval=16, threshold=2))
    assert result.stop_reason == [StopReason.LENGTH]


def test_stops_of_one_step_are_ordered_eos_guardian_length(model):
    prompt = prompts(20)
    tokens = generate(model, prompt, max_new_tokens=8).tokens[0]
    assert tokens[-1] not in tokens[:-1]
    always = Guardian(interval=8, threshold=1000)
    options = {"max_new_tokens": 8, "guardian": always}
    assert generate(model, prompt, **options, eos_token_id=tokens[-1]).stop_reason == [StopReason.EOS]
    assert generate(model, prompt, **options).stop_reason == [StopReason.GUARDIAN]


def test_sampling_depends_on_the_rows_own_seed(model):
    batch = prompts(20, 5, 11)
    options = {"max_new_tokens": NEW, "temperature": 1.0, "top_k": 50, "top_p": 0.95}
    first = generate(model, batch, seed=7, **options).tokens
    assert first == generate(model, batch, seed=7, **options).tokens
    assert first != generate(model, batch, seed=8, **options).tokens
    assert first == [generate(model, [prompt], seed=7 + row, **options).tokens[0] for row, prompt in enumerate(batch)]
    assert first == generate(model, batch, seed=np.int64(7), **options).tokens
    assert first == generate(model, batch, seed=np.array([7, 8, 9]), **options).tokens
    # A seed for each sequence frees it from its place in the batch.
    assert first[::-1] == generate(model, batch[::-1], seed=[9, 8, 7], **options).tokens
    with pytest.raises(ValueError, match="seed: expected a number, or one for each of 3 sequences, got 2"):
        generate(model, batch, seed=[1, 2], **options)


def test_events_stream_the_result(model):
    events = []
    result = generate(model, prompts(20, 5), max_new_tokens=NEW, on_token=events.append)
    assert [event.step for event in events] == list(range(NEW))
    assert [[event.tokens[row] for event in events] for row in (0, 1)] == result.tokens
    assert [event.seconds for event in events] == result.step_times
    assert [[event.phrases[row] for event in events] for row in (0, 1)] == [curve.tolist() for curve in result.lz77]
    assert all(event.gain == {} for event in events)
    assert max(event.kv_bytes for event in events) == result.kv_bytes_peak


def test_a_loop_goes_on_where_it_was_left(model):
    want = generate(model, prompts(20, 5), max_new_tokens=NEW).tokens
    with DecodeLoop(model, prompts(20, 5), max_new_tokens=NEW) as loop:
        with pytest.raises(RuntimeError, match="DecodeLoop: step: expected prefill first"):
            loop.step()
        loop.prefill()
        with pytest.raises(RuntimeError, match="DecodeLoop: prefill: the prompts have been run"):
            loop.prefill()
        for event in loop:
            if event.step == 2:
                break
        assert [event.step for event in loop] == list(range(3, NEW)) and list(loop) == []
        with pytest.raises(RuntimeError, match="DecodeLoop: step: no row runs"):
            loop.step()
    assert loop.result().tokens == want


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
@pytest.mark.parametrize("fail_at", [0, 1, 4])
def test_interruption_leaves_what_was_produced(model, monkeypatch, error, fail_at):
    batch, calls = prompts(20, 5), []
    want = generate(model, batch, max_new_tokens=NEW).tokens
    forward = model.model.layers[2].forward

    def interrupted(*arguments, **options):
        calls.append(None)
        if len(calls) == fail_at + 2:
            raise error
        return forward(*arguments, **options)

    monkeypatch.setattr(model.model.layers[2], "forward", interrupted)
    loop = DecodeLoop(model, batch, max_new_tokens=NEW)
    with pytest.raises(error), loop:
        for _ in loop:
            pass
    result = loop.result()
    assert result.tokens == [tokens[:fail_at] for tokens in want]
    assert result.stop_reason == [StopReason.RUNNING] * 2 and len(result.lz77[0]) == fail_at
    assert model.config._attn_implementation == "sdpa"


def test_a_callback_that_raises_ends_the_run(model):
    def stop(event):
        if event.step == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        generate(model, prompts(20), on_token=stop)
    assert model.config._attn_implementation == "sdpa"


def test_inputs_of_every_kind_are_alike(model):
    rows = prompts(12, 12)
    want = hf_generate(model, torch.stack(rows), 8)
    for batch in (torch.stack(rows), rows, [row.tolist() for row in rows], [row.int() for row in rows]):
        assert generate(model, batch, max_new_tokens=8).tokens == want


@pytest.mark.parametrize("batch", [[], torch.zeros(0, 4, dtype=torch.int64)])
def test_empty_batch(model, batch):
    result = generate(model, batch)
    assert result.tokens == result.stop_reason == result.lz77 == result.phrases == result.ratio == []
    assert (result.ttft, result.tbt, result.jct, result.kv_bytes_peak) == (0, 0, 0, 0)
    with pytest.raises(ValueError, match="empty batch"):
        DecodeLoop(model, batch)


@pytest.mark.parametrize(
    ("batch", "options", "message"),
    [
        ([[1], []], {}, "sequence 1: expected at least one token"),
        (torch.zeros(2, 0, dtype=torch.int64), {}, "sequence 0: expected at least one token"),
        ([[1, -1]], {}, "sequence 0: expected ids from 0 to 210, got -1"),
        ([[1], [211]], {}, "sequence 1: expected ids from 0 to 210, got 211"),
        ([[1.5]], {}, "sequence 0: expected integers"),
        ([1, 2], {}, "sequence 0: expected a list of ids"),
        (torch.zeros(4, dtype=torch.int64), {}, r"expected \[batch, tokens\]"),
        ([[1]], {"max_new_tokens": 0}, "max_new_tokens: expected a whole number of at least 1, got 0"),
        ([[1]], {"max_new_tokens": 2.5}, "max_new_tokens: expected a whole number of at least 1, got 2.5"),
        ([[1]], {"temperature": -1}, "temperature: expected"),
        ([[1]], {"top_p": 0}, "top_p: expected"),
        ([[1]], {"seed": 2**64}, "seed: expected a whole number of 64 bits, got 18446744073709551616"),
        ([[1], [2]], {"seed": 2**64 - 1}, "seed: expected a whole number of 64 bits, got 18446744073709551616"),
        ([[1]], {"guardian": Guardian}, r"guardian: expected a stop rule, such as Guardian\(\), or None, got <class"),
        ([[1]], {"policy": Quest, "budget": 64}, "policy: expected a name or a Policy object, got <class"),
        ([[1]], {"policy": ["quest"], "guardian": Guardian(loss_aware=True)}, "policy: expected a name or a Policy"),
        ([[1]], {"policy": "qest"}, "did you mean 'quest'"),
        ([[1]], {"policy": "quest"}, "budget: expected a number of tokens"),
        ([[1]], {"policy": "quest", "budget": 8}, "budget: expected at least 16"),
        ([[1]], {"policy": "full", "budget": 8}, "policy full: .*budget"),
        ([[1] * 90], {"policy": "sink", "budget": 64, "protect_prompt": True}, "protect a prompt of 90"),
        ([[1]], {"page_size": 12}, "page_size: expected a power of two"),
    ],
)
def test_bad_input_raises_before_any_work(model, batch, options, message):
    with LogitsLog(model) as log, pytest.raises(ValueError, match=message):
        generate(model, batch, **options)
    assert not log.logits and model.config._attn_implementation == "sdpa"

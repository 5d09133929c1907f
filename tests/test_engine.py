"""The engine: the same sequences as `generate` gives, in slots that come and go."""

import pytest
import torch
from tiny_models import build, prompts

from lil_ops import Answer, Engine, Guardian, Repetition, Request, Rescue, StopReason, TokenBudget, generate
from lil_ops.cache import OutOfPagesError

POLICIES = {
    "full": {},
    "sink": {"budget": 32},
    "h2o": {"budget": 32},
    "quest": {"budget": 32, "dense_layers": 1},
    "infllm": {"budget": 64},
    "raas": {"budget": 96},
    "snapkv": {"budget": 48, "recent": 8},
    "tova": {"budget": 32},
    "lessismore": {"budget": 64, "dense_layers": 1},
}
LENGTHS = [20, 3, 41, 9, 17, 30, 1]
NEW = [24, 40, 7, 1, 33, 12, 18]


@pytest.fixture(scope="module")
def model():
    return build("llama")


def served(model, requests, slots=3, **options):
    """The completions, in the order of the requests."""
    with Engine(model, slots=slots, max_tokens=96, graph=False, **options) as engine:
        completions = list(engine.run(requests))
        assert engine.free_slots == slots and engine.cache.kv.bytes_in_use == 0
    by_request = {id(completion.request): completion for completion in completions}
    assert len(completions) == len(requests)
    return [by_request[id(request)] for request in requests]


def alone(model, request, **options):
    """The result of `generate` for a request."""
    return generate(model, [request.prompt], max_new_tokens=request.max_new_tokens, seed=request.seed, **options)


def check_same(completion, result):
    assert completion.tokens == result.tokens[0]
    assert completion.stop_reason == result.stop_reason[0]
    assert completion.events == result.events[0]
    assert completion.phrases == result.phrases[0]


@pytest.fixture
def requests():
    pairs = zip(prompts(*LENGTHS), NEW, strict=True)
    return [Request(prompt, max_new_tokens=new, seed=i) for i, (prompt, new) in enumerate(pairs)]


@pytest.mark.parametrize("policy", POLICIES)
def test_sequences_in_slots_are_those_of_generate(model, requests, policy):
    options = {"policy": policy, **POLICIES[policy], "page_size": 8}
    for request, completion in zip(requests, served(model, requests, **options), strict=True):
        check_same(completion, alone(model, request, **options))


@pytest.mark.parametrize("rule", [Guardian(8, 7), Repetition(4, 1, 2), TokenBudget(11)])
def test_stops(model, requests, rule):
    options = {"guardian": rule, "eos_token_id": [5, 77]}
    completions = served(model, requests, **options)
    for request, completion in zip(requests, completions, strict=True):
        check_same(completion, alone(model, request, **options))
    assert len({completion.stop_reason for completion in completions}) > 1


@pytest.mark.parametrize("sampling", [{"temperature": 0.8}, {"temperature": 1.2, "top_k": 20, "top_p": 0.9}])
def test_draws_are_those_of_the_seed(model, requests, sampling):
    for request, completion in zip(requests, served(model, requests, **sampling), strict=True):
        check_same(completion, alone(model, request, **sampling))


@pytest.mark.parametrize("lag", [0, 5])
@pytest.mark.parametrize(
    "action", [Answer((7, 8, 9), 5), Rescue(), Rescue(48, limit=1), Rescue(limit=1, then=Answer((7,), 6))]
)
def test_actions(model, requests, action, lag):
    options = {"policy": "quest", "budget": 32, "dense_layers": 0, "page_size": 8, "guardian": Guardian(6, 6)}
    options["action"] = action
    events = []
    for request, completion in zip(requests, served(model, requests, lag=lag, **options), strict=True):
        check_same(completion, alone(model, request, **options))
        events += [event.what for event in completion.events]
    assert events


def test_a_loss_aware_rule(model, requests):
    options = {"policy": "quest", "budget": 32, "dense_layers": 0, "page_size": 8, "scoring": "meanstd"}
    options["guardian"] = Guardian(8, 4, loss_aware=True, loss_weight=20.0)
    completions = served(model, requests, **options)
    for request, completion in zip(requests, completions, strict=True):
        check_same(completion, alone(model, request, **options))
    assert StopReason.GUARDIAN in {completion.stop_reason for completion in completions}


def test_pages_of_whole_sequences_are_taken_at_once_or_not_at_all(model):
    with Engine(model, slots=2, max_tokens=64, num_pages=5, graph=False) as engine:
        engine.add(Request(prompts(20)[0], max_new_tokens=13))  # 32 tokens are cached: 2 pages
        with pytest.raises(OutOfPagesError, match=r"needs 4 more pages .* 1 short"):
            engine.add(Request(prompts(30)[0], max_new_tokens=30))
        engine.add(Request(prompts(30)[0], max_new_tokens=19))  # 48: 3 pages
        assert engine.free_slots == 0
        with pytest.raises(ValueError, match="Engine: max_new_tokens: expected from 1 to 24 behind a prompt of 40"):
            engine.add(Request(prompts(40)[0], max_new_tokens=25))


def test_policies_that_decide_on_the_host(model):
    with pytest.raises(ValueError, match="policy rkv decides on the host"):
        Engine(model, slots=1, max_tokens=64, policy="rkv", budget=32)


def test_many_sequences_through_few_slots(model):
    generator = torch.Generator().manual_seed(0)
    lengths, new = (torch.randint(1, 30, (60,), generator=generator).tolist() for _ in range(2))
    requests = [Request(p, n, seed) for seed, (p, n) in enumerate(zip(prompts(*lengths), new, strict=True))]
    options = {"policy": "h2o", "budget": 24, "page_size": 8, "guardian": Guardian(8, 7), "temperature": 0.7}
    for request, completion in zip(requests, served(model, requests, slots=8, **options), strict=True):
        check_same(completion, alone(model, request, **options))

"""The engine: the same sequences as `generate` gives, in slots that come and go."""

import os
from dataclasses import replace

import pytest
import torch
from tiny_models import build, prompts

import lil_ops
from lil_ops import Answer, Engine, Guardian, Repetition, Request, Rescue, StopReason, TokenBudget, generate
from lil_ops.cache import OutOfPagesError
from lil_ops.stopping import StopRule

OPERATORS = [
    "append_kv",
    "sparse_decode",
    "evict_pages",
    "fold_mass",
    "information_loss",
    "sparse_decode_step",
    "represent_page",
    "lz77_append",
    "guardian_check",
]
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
SOAK = int(os.environ.get("LIL_SOAK", "90"))  # sequences, over all policies
LENGTHS = [20, 3, 41, 9, 17, 30, 1]
NEW = [24, 40, 7, 1, 33, 12, 18]


@pytest.fixture
def model(device):
    return build("llama").to(device)


def served(model, requests, slots=3, **options):
    """The completions, in the order of the requests; on CUDA out of a graph."""
    with Engine(model, slots=slots, max_tokens=96, graph=model.device.type == "cuda", **options) as engine:
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


@pytest.mark.parametrize("rule", [None, Guardian(8, 7), Guardian(8, 4, loss_aware=True)])
def test_what_attention_lost_is_measured(model, requests, rule):
    """For each sequence by itself, whoever was in its slot before; and nothing where nobody asks. By estimates: the
    bounds of this model are so near to 1 that their last digit, which a batch may change, is a bit and more."""
    options = {"policy": "quest", "budget": 32, "dense_layers": 0, "page_size": 8, "scoring": "meanstd"}
    options["guardian"] = rule
    options["action"] = Rescue(limit=1) if rule else None
    lost = []
    completions = served(model, requests, measure_loss=True, **options)
    for request, completion in zip(requests, completions, strict=True):
        result = alone(model, request, measure_loss=True, **options)
        check_same(completion, result)
        assert completion.lost_bits == pytest.approx(result.lost_bits[0], rel=1e-4)
        lost.append(completion.lost_bits)
    assert len(set(lost)) > len(lost) // 2 and max(lost) > 0
    if rule is None:
        assert served(model, requests[:1], **options)[0].lost_bits is None
        assert alone(model, requests[0], **options).lost_bits is None
        assert alone(model, requests[0], measure_loss=True).lost_bits == [0]


def test_pages_of_whole_sequences_are_taken_at_once_or_not_at_all(model):
    with Engine(model, slots=2, max_tokens=64, num_pages=5) as engine:
        engine.add(Request(prompts(20)[0], max_new_tokens=13))  # 32 tokens are cached: 2 pages
        with pytest.raises(OutOfPagesError, match=r"needs 4 more pages .* 1 short"):
            engine.add(Request(prompts(30)[0], max_new_tokens=30))
        engine.add(Request(prompts(30)[0], max_new_tokens=19))  # 48: 3 pages
        assert engine.free_slots == 0
        with pytest.raises(ValueError, match="Engine: prompt: expected at most 63 tokens, got 64"):
            engine.add(Request(prompts(64)[0]))
        for count in (25, 0, 2.0):
            with pytest.raises(ValueError, match=f"a whole number from 1 to 24 behind a prompt of 40 .*, got {count}"):
                engine.add(Request(prompts(40)[0], max_new_tokens=count))


class AtFive(StopRule):
    """Fires at the fifth token, and at no other."""

    interval = 4

    def start(self, batch, device="cpu"):
        self.gain = torch.full((batch,), -1, dtype=torch.int32, device=device)
        return self

    def check(self, now):
        now.stop.masked_fill_((now.num_tokens == 5) & (now.stop == 0), StopReason.GUARDIAN)

    def reset(self, row):
        pass


@pytest.mark.parametrize("rule", [TokenBudget(5), Repetition(4, 1, 2), AtFive()])
def test_a_rule_does_not_fire_again_where_no_token_came(model, rule):
    """A slot that goes on after its rule fired stands still while another sequence's prompt runs."""
    pairs = zip(prompts(20, 3, 9, 17), (30, 5, 6, 20), strict=True)
    requests = [Request(prompt, new, seed) for seed, (prompt, new) in enumerate(pairs)]
    options = {"policy": "quest", "budget": 32, "page_size": 8, "guardian": rule, "action": Rescue(limit=1)}
    for request, completion in zip(requests, served(model, requests, 2, **options), strict=True):
        check_same(completion, alone(model, request, **options))


@pytest.mark.parametrize("layer", [0, 3])
def test_a_request_that_fails_leaves_nothing_behind(model, requests, layer):
    def breaks(*arguments):
        raise torch.OutOfMemoryError("none left")

    options = {"policy": "quest", "budget": 32, "page_size": 8}
    with Engine(model, slots=2, max_tokens=96, **options) as engine:
        engine.step()  # nobody runs
        engine.add(requests[0])
        hook = model.model.layers[layer].mlp.register_forward_pre_hook(breaks)
        with pytest.raises(torch.OutOfMemoryError):
            engine.add(requests[1])
        hook.remove()
        engine.step()
        for seed in (2**70, 1.5):
            with pytest.raises((ValueError, RuntimeError, TypeError)):
                engine.add(replace(requests[1], seed=seed))
        assert engine.free_slots == 1
        done = {id(each.request): each for each in engine.run([requests[2]])}
        assert engine.cache.kv.bytes_in_use == 0
    for request in (requests[0], requests[2]):
        check_same(done[id(request)], alone(model, request, **options))


def test_a_request_waits_for_pages(model, requests):
    options = {"policy": "quest", "budget": 32, "page_size": 8}
    with Engine(model, slots=2, max_tokens=96, num_pages=8, **options) as engine:
        completions = list(engine.run(requests[2:4] * 2))
        with pytest.raises(OutOfPagesError, match="1 short"):
            list(engine.run([Request(prompts(20)[0], 53)]))
    assert len(completions) == 4
    for completion in completions:
        check_same(completion, alone(model, completion.request, **options))


def test_the_last_token_ends_as_it_does_in_generate(model):
    """An end of sequence at an answer's limit, and a rescue whose stretch ends with the output."""
    (prompt,) = prompts(20)
    options = {"policy": "quest", "budget": 32, "page_size": 8}
    free = alone(model, Request(prompt, 30), **options).tokens[0]
    rescued = {**options, "guardian": AtFive(), "action": Rescue()}
    (completion,) = served(model, [Request(prompt, 9)], **rescued)
    check_same(completion, alone(model, Request(prompt, 9), **rescued))
    assert [event.what for event in completion.events] == ["rescue", "recovered"]

    answered = {**options, "guardian": TokenBudget(4), "action": Answer((free[4],), 3)}
    last = alone(model, Request(prompt, 30), **answered).tokens[0][-1]
    answered["eos_token_id"] = [last]
    (completion,) = served(model, [Request(prompt, 30)], **answered)
    check_same(completion, alone(model, Request(prompt, 30), **answered))
    assert completion.stop_reason == StopReason.EOS


def test_what_an_engine_refuses(model):
    with Engine(model, slots=1, max_tokens=64) as engine:
        engine.add(Request(prompts(9)[0], max_new_tokens=5))
        with pytest.raises(ValueError, match="Engine: expected a free slot, got 1 that are taken"):
            engine.add(Request(prompts(9)[0], max_new_tokens=5))
    with pytest.raises(ValueError, match="Answer: tokens: expected at most 64 in an Engine, got 65"):
        Engine(model, slots=1, max_tokens=64, guardian=TokenBudget(4), action=Answer(range(65)))
    for lag in (-1, 2.5):
        with pytest.raises(ValueError, match=f"Engine: lag: expected a whole number of at least 0, got {lag}"):
            Engine(model, slots=1, max_tokens=64, lag=lag)
    if model.device.type == "cpu":
        with pytest.raises(ValueError, match="graph: expected None or False for a model on cpu, got True"):
            Engine(model, slots=1, max_tokens=64, graph=True)


def test_after_a_step_that_broke_off_nothing_goes_on(model, requests):
    with Engine(model, slots=2, max_tokens=96, graph=False) as engine:
        engine.add(requests[0])
        interrupted = model.model.layers[2].mlp.register_forward_pre_hook(lambda *arguments: 1 / 0)
        try:
            with pytest.raises(ZeroDivisionError):
                engine.step()
        finally:
            interrupted.remove()
        for use in (engine.step, engine.completed, lambda: engine.add(requests[1]), lambda: list(engine.run([]))):
            with pytest.raises(RuntimeError, match="Engine: a step broke off"):
                use()


def test_an_engine_is_used_in_its_block(model, requests):
    """A compiled model would be traced anew, with attention that knows no cache."""
    with Engine(model, slots=1, max_tokens=96) as engine:
        engine.add(requests[0])
    for use in (engine.step, lambda: engine.add(requests[1])):
        with pytest.raises(RuntimeError, match="expected to be used in its `with` block"):
            use()


def test_requests_are_taken_as_slots_are_free(model, requests):
    taken = []

    def source():
        for request in requests[:5]:
            taken.append(request)
            yield request

    with Engine(model, slots=2, max_tokens=96) as engine:
        run = engine.run(source())
        assert taken == []
        assert requests.index(next(run).request) < 2  # the very one: requests are told apart as objects
        assert taken == requests[:2] and len(set(requests)) == len(requests)
        assert len(list(run)) == 4 and taken == requests[:5]

        # One that cannot be served: what runs goes on.
        with pytest.raises(ValueError, match="max_new_tokens: expected a whole number from 1 to"):
            list(engine.run([requests[0], Request(requests[1].prompt, 500)]))
        assert [completion.request for completion in engine.run([])] == [requests[0]]


def test_a_step_that_cannot_be_captured_runs_without_a_graph(model, requests, monkeypatch):
    def breaks(*arguments):
        raise RuntimeError("not in a capture\nand more")

    def capture(self, raised):
        """Breaks off in the middle of a pass over slots that stand still, as one that waits for the device does."""
        hook = model.model.layers[2].mlp.register_forward_pre_hook(breaks)
        stop = self._stop.clone()
        self._stop.fill_(StopReason.LENGTH)
        try:
            self._device_step(raised)
        finally:
            hook.remove()
            self._stop.copy_(stop)

    monkeypatch.setattr(Engine, "_capture", capture)
    with Engine(model, slots=1, max_tokens=96) as engine:
        engine.add(requests[0])
        with torch.inference_mode(), pytest.warns(UserWarning, match="without a graph: not in a capture$"):
            engine._replay(raised=False)
        for _ in range(NEW[0]):
            engine.step()
        (completion,) = engine.completed(wait=True)
    check_same(completion, alone(model, requests[0]))


def test_policies_that_decide_on_the_host(model):
    with pytest.raises(ValueError, match="policy rkv decides on the host"):
        Engine(model, slots=1, max_tokens=64, policy="rkv", budget=32)


@pytest.mark.parametrize("policy", POLICIES)
def test_a_graph_gives_the_bits_of_its_step_and_no_step_waits(model, requests, policy):
    """On CUDA; elsewhere there is no graph, and both are the same."""
    cuda, outputs = model.device.type == "cuda", []
    for graph in (cuda, False):
        options = {"policy": policy, **POLICIES[policy], "page_size": 8, "lag": 99, "temperature": 0.8}
        with Engine(model, slots=3, max_tokens=96, graph=graph, **options) as engine:
            for request in requests[:3]:
                engine.add(replace(request, max_new_tokens=50))
            engine.step()  # captures
            if cuda:
                torch.cuda.set_sync_debug_mode("error")
            try:
                for _ in range(48):
                    engine.step()
            finally:
                if cuda:
                    torch.cuda.set_sync_debug_mode("default")
            done = engine.completed(wait=True)
        assert [completion.stop_reason for completion in done] == [StopReason.LENGTH] * 3
        outputs.append([completion.tokens for completion in done])
    assert outputs[0] == outputs[1] and all(len(tokens) == 50 for tokens in outputs[0])
    if cuda:
        lil_ops.check_errors()


def test_two_thousand_steps_with_and_without_a_graph(model):
    if model.device.type == "cpu":
        pytest.skip("needs a CUDA graph")
    options = {"policy": "quest", **POLICIES["quest"], "temperature": 0.9, "guardian": Guardian(64, 0)}
    outputs = []
    for graph in (True, False):
        with Engine(model, slots=3, max_tokens=2064, graph=graph, **options) as engine:
            requests = [Request(prompt, 2001, seed) for seed, prompt in enumerate(prompts(20, 3, 41))]
            outputs.append({done.request.seed: done.tokens for done in engine.run(requests)})
    assert outputs[0] == outputs[1] and all(len(tokens) == 2001 for tokens in outputs[0].values())


@pytest.mark.parametrize("family", ["qwen2", "gemma2"])
def test_compiled_steps(device, family):
    """One graph for all steps, of the same tokens. The compiler is asked for no code of its own on the CPU: that is
    slow, and not what is tested."""
    model = build(family).to(device)
    options = {"policy": "quest", "budget": 32, "dense_layers": 1, "page_size": 8, "guardian": Guardian(8, 2)}
    backend = {} if device == "cuda" else {"backend": "aot_eager"}
    requests = [Request(prompt, 20, seed) for seed, prompt in enumerate(prompts(20, 3, 41, 9))]
    torch._dynamo.reset()
    with torch._dynamo.config.patch(error_on_recompile=True):
        completions = served(model, requests, compile=backend or True, **options)
    for request, completion in zip(requests, completions, strict=True):
        check_same(completion, alone(model, request, **options))


@pytest.mark.parametrize("temperature", [0, 0.7])
def test_compiled_bookkeeping(temperature):
    """What a compiled engine compiles beside the model where it runs on CUDA, and all that it writes."""
    model, results = build("llama"), []
    requests = [Request(prompt, 20, seed) for seed, prompt in enumerate(prompts(20, 3, 41, 9))]
    options = {"guardian": Guardian(8, 2), "action": Answer([7, 8], max_tokens=4), "temperature": temperature}
    for compiles in (False, True):
        torch._dynamo.reset()
        with Engine(model, slots=3, max_tokens=96, policy="h2o", budget=32, eos_token_id=[5, 77], **options) as engine:
            if compiles:
                engine.compile_bookkeeping(backend="aot_eager")
            with torch._dynamo.config.patch(error_on_recompile=True):
                results.append({done.request.seed: done for done in engine.run(requests)})
    assert results[0] == results[1]


@pytest.mark.parametrize("policy", POLICIES)
def test_many_sequences_through_few_slots(model, policy):
    """Each as it is alone in an engine like this, whatever goes on in the other slots; nothing is left behind."""
    count = -(-SOAK // len(POLICIES))
    slots = min(64, -(-count // 3))
    generator = torch.Generator().manual_seed(len(policy))
    lengths, new = (torch.randint(1, 40, (count,), generator=generator).tolist() for _ in range(2))
    requests = [Request(p, n, seed) for seed, (p, n) in enumerate(zip(prompts(*lengths), new, strict=True))]
    options = {"policy": policy, **POLICIES[policy], "page_size": 8, "temperature": 0.7, "eos_token_id": [5, 77]}
    options |= {"guardian": Guardian(8, 7), "action": Answer([7, 8], max_tokens=4)}
    with Engine(model, slots=slots, max_tokens=96, graph=model.device.type == "cuda", **options) as engine:
        together = {done.request.seed: done for done in engine.run(requests)}
        in_use = torch.cuda.memory_allocated() if model.device.type == "cuda" else 0
        for request in requests:
            (solo,) = engine.run([request])
            assert together[request.seed] == solo
        assert engine.cache.kv.bytes_in_use == 0
        if in_use:
            lil_ops.check_errors()
            assert torch.cuda.memory_allocated() <= in_use
    assert {done.stop_reason for done in together.values()} > {StopReason.LENGTH}

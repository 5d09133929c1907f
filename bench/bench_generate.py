"""`lil_ops.generate` against transformers' own generate, where the time of one decode step goes, and which share of it
the early stop takes.

Needs the SmolLM2 model (`make models`). The variants of a case run in turn, so that whatever else the machine does
meets all of them; pytest-benchmark then gets the recorded times.
"""

import os
import statistics
import time
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from recorded import recorded, report

from lil_ops import DecodeLoop, Guardian, decode, generate, load_model, ops

MODELS = Path(os.environ.get("LIL_MODELS", Path(__file__).resolve().parents[1] / "models"))
GGUF = MODELS / "SmolLM2-135M-Instruct" / "model.gguf"
PROMPT, NEW, ROUNDS, BUDGET = "Once upon a time, in a village by the sea,", 128, 5, 64


pytestmark = [
    pytest.mark.benchmark(timer=recorded),
    pytest.mark.skipif(not GGUF.exists(), reason=f"{GGUF} is missing (make models, or set LIL_MODELS to its folder)"),
]


@pytest.fixture(scope="module", params=[torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def smollm2(request):
    """``(model, prompt, name of the dtype)``."""
    model, tokenizer = load_model(GGUF, dtype=request.param)
    return model, tokenizer(PROMPT, return_tensors="pt").input_ids, str(request.param).removeprefix("torch.")


VARIANTS = {
    "lil": {},
    f"lil, quest, budget {BUDGET}": {"policy": "quest", "budget": BUDGET},
    f"lil, sink, budget {BUDGET}": {"policy": "sink", "budget": BUDGET},
    "transformers": None,
}


@pytest.fixture(scope="module")
def runs(smollm2):
    """Seconds of each run of each variant."""
    model, ids, dtype = smollm2

    def tokens(policy):
        if policy is not None:
            return generate(model, ids, max_new_tokens=NEW, eos_token_id=(), **policy).tokens[0]
        mask = torch.ones_like(ids)
        return model.generate(ids, attention_mask=mask, max_new_tokens=NEW, do_sample=False)[0, ids.shape[1] :].tolist()

    seconds = {variant: [] for variant in VARIANTS}
    for _ in range(ROUNDS + 1):
        outputs = {}
        for variant, policy in VARIANTS.items():
            started = time.perf_counter()
            outputs[variant] = tokens(policy)
            seconds[variant].append(time.perf_counter() - started)
        assert {len(output) for output in outputs.values()} == {NEW}
        assert outputs["lil"] == outputs["transformers"] or dtype != "float32"
    return {variant: times[1:] for variant, times in seconds.items()}


@pytest.mark.parametrize("variant", VARIANTS)
def test_generate(benchmark, smollm2, runs, variant):
    seconds = runs[variant]
    case = f"generate {NEW} tokens, SmolLM2-135M {smollm2[2]}, batch 1"
    report(benchmark, case, variant, seconds, tokens_per_s=round(NEW / statistics.median(seconds), 1))


class Stopwatch:
    """Adds up the time of the functions it wraps, by the name given."""

    def __init__(self, monkeypatch, clock=time.perf_counter):
        self._monkeypatch, self._clock, self.seconds = monkeypatch, clock, {}

    def wrap(self, owner, attribute, name):
        function = getattr(owner, attribute)

        def timed(*arguments, **options):
            started = self._clock()
            try:
                return function(*arguments, **options)
            finally:
                self.seconds[name] = self.seconds.get(name, 0.0) + self._clock() - started

        self._monkeypatch.setattr(owner, attribute, timed)


@pytest.fixture(scope="module")
def parts(smollm2):
    """Seconds of each part of every step of a run with Quest and a Guardian."""
    model, ids, _ = smollm2
    options = {"policy": "quest", "budget": BUDGET, "guardian": Guardian(interval=NEW, threshold=0)}
    steps = []
    with pytest.MonkeyPatch.context() as monkeypatch:
        watch = Stopwatch(monkeypatch)
        # The early stop's operators run outside of attention.
        for name in list(vars(ops)):
            if hasattr(torch.ops.lil, name) and name not in ("lz77_append", "guardian_check"):
                watch.wrap(ops, name, "operators")
        with DecodeLoop(model, ids, max_new_tokens=NEW, eos_token_id=(), **options) as loop:
            watch.wrap(loop, "_forward", "forward")
            watch.wrap(loop.cache, "attend", "attend")
            watch.wrap(loop._tracker, "append", "lz77")
            for event in loop:
                steps.append(watch.seconds | {"step": event.seconds})
                watch.seconds.clear()
    return steps[1:]


PARTS = {
    "lil": lambda step: step["step"],
    "outside the model": lambda step: step["step"] - step["forward"],
    "cache and policy, around the operators": lambda step: step["attend"] - step["operators"],
    "lz77_append": lambda step: step["lz77"],
}


@pytest.mark.parametrize("part", PARTS)
def test_share_of_a_step(benchmark, smollm2, parts, part):
    case = f"one step of the loop, SmolLM2-135M {smollm2[2]}, quest with a Guardian, batch 1"
    report(benchmark, case, part, [PARTS[part](step) for step in parts])


@pytest.mark.parametrize("batch", [1, 16])
def test_share_of_the_stop(benchmark, smollm2, batch):
    """A loop with a Guardian and one without, a step of either in turn. What they differ by behind the choice of the
    tokens, and `lz77_append`, which both have, is the stop; whole steps differ by more than that by chance. In the
    processor's time on one thread, which a busy machine does not prolong."""
    model, ids, dtype = smollm2
    prompts = [ids[0]] * batch
    options = {"policy": "quest", "budget": BUDGET, "max_new_tokens": NEW // 2, "eos_token_id": ()}
    guarded = DecodeLoop(model, prompts, guardian=Guardian(interval=32, threshold=0), **options)
    plain, steps = DecodeLoop(model, prompts, **options), []
    with pytest.MonkeyPatch.context() as monkeypatch, one_thread(), guarded, plain:
        watch = Stopwatch(monkeypatch, time.thread_time)
        watch.wrap(decode, "sample", "sample")
        watch.wrap(guarded._watch, "check", "check")
        for loop in (guarded, plain):
            loop.prefill()
            watch.wrap(loop, "step", "step")
            watch.wrap(loop, "_accept", "accept")
            watch.wrap(loop._tracker, "append", "lz77")
        while guarded.active:
            step, without = timed(watch, guarded), timed(watch, plain)
            steps.append(step | {"stop": step["behind"] - without["behind"] + step["lz77"]})
    facts = {f"{part}_us": round(statistics.median(step[part] for step in steps) * 1e6, 1) for part in STOP_PARTS}
    facts["share"] = round(statistics.median(step["stop"] / step["step"] for step in steps), 5)
    case = f"the early stop, SmolLM2-135M {dtype}, batch {batch}"
    stop = [step["stop"] for step in steps]
    report(benchmark, case, f"{dtype}, batch {batch}", stop, table="stop", budget=BUDGET, **facts)


def timed(watch, loop):
    """Seconds of the parts of the loop's next step; ``behind``: behind the choice of its tokens."""
    watch.seconds.clear()
    loop.step()
    return watch.seconds | {"behind": watch.seconds["accept"] - watch.seconds["sample"]}


STOP_PARTS = "step", "behind", "lz77", "check"


@contextmanager
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)

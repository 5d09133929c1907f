"""Each policy against its rule (`policy_models`): the same tokens, the same logits and the same tokens read.

The rule runs over the tokens that the package generated. Its decisions are float64, the package's float32, and a near
tie may fall either way: seeds are such that none does. A failure tells how close the closest decision was; below about
1e-6 another seed is the answer.
"""

import math
import os
from pathlib import Path

import policy_models
import pytest
import torch
import torch.nn.functional as F
from policy_models import H2O, RKV, TOVA, InfLLM, LessIsMore, Quest, RaaS, Sink, SnapKV, redundancy
from tiny_models import LogitsLog, build, prompts

from lil_ops import policies
from lil_ops.decode import DecodeLoop

pytestmark = pytest.mark.usefixtures("one_thread")
PAGE = 16
# Prompts here may be longer than a budget of tokens; RaaS pins them, and needs room.
CASES = {
    "sink": {"budget": 48},
    "h2o": {"budget": 48},
    "tova": {"budget": 48},
    "snapkv": {"budget": 48},
    "rkv": {"budget": 48, "buffer": 16},
    "raas": {"budget": 112},
    "quest": {"budget": 64, "dense_layers": 1},
    "infllm": {"budget": 96},
    "lessismore": {"budget": 64, "dense_layers": 1, "select_layers": (1,)},
}
# Some need a smaller budget for a short output to fill.
SMOLLM2 = {**CASES, "raas": {"budget": 96}, "infllm": {"budget": 80, "recent": 24}, "lessismore": {"budget": 64}}
OTHERS = [
    ("h2o", {"budget": 64, "protect_prompt": True, "recent": 8}),
    ("sink", {"budget": 50, "sink": 1}),
    ("tova", {"budget": 40, "recent": 5, "sink": 2}),
    ("quest", {"budget": 80, "sink": 9, "recent": 20}),
]
LONG = 500


def compared(model, sequences, new_tokens, name, options):
    """Run the package, and the rule over its tokens; everything equal."""
    if name not in policies.POLICIES:
        pytest.skip(f"no policy {name!r} yet")
    found, sparse = Found(model, sequences, new_tokens, name, options), False
    for row, (prompt, tokens) in enumerate(zip(sequences, found.tokens, strict=True)):
        rule = policy_models.run(model, name, map(int, prompt), tokens, page_size=PAGE, **options)
        note = f"row {row} (closest decision {rule.closest:.1e})"
        for step, layers in enumerate(found.reads):
            for layer, mask in layers.items():
                same_tokens(mask[row], rule.reads[layer][step], f"{note}, layer {layer}, decode step {step}")
        torch.testing.assert_close(found.logits[row], rule.logits, atol=1e-4, rtol=1e-4, msg=f"{note}: {{}}".format)
        sparse |= any(not mask.all() for masks in rule.reads for mask in masks)
    assert sparse, "everything was read, which proves little"


def same_tokens(mask, expected, note):
    # The last page may have slots that no token has filled.
    mask = F.pad(mask, (0, max(0, expected.shape[-1] - mask.shape[-1])))[:, : expected.shape[-1]]
    for head, (found, wanted) in enumerate(zip(mask, expected, strict=True)):
        extra, missing = ((a & ~b).nonzero().flatten().tolist() for a, b in ((found, wanted), (wanted, found)))
        assert not extra and not missing, f"{note}, KV head {head}: read {extra} in place of {missing}"


class Found:
    """A run of the package: ``tokens`` and ``logits [steps, vocab]`` of each row, and ``reads`` for each decode step.

    ``reads[step]`` has, for the layers where the policy tells, a mask ``[rows, kv_heads, tokens]`` of what is held once
    the step is done, or, where everything is kept, of what was selected. What a prompt leaves is not compared, as no
    query reads it: the first step makes room in it before it reads.
    """

    def __init__(self, model, sequences, new_tokens, name, options):
        self.reads, self._selections, rows = [], {}, len(sequences)
        options = {"max_new_tokens": new_tokens, "page_size": PAGE, "eos_token_id": [], **options}
        with DecodeLoop(model, sequences, policy=name, **options) as loop, LogitsLog(model) as log:
            policy = loop.cache.policy
            if not hasattr(policy, "held_positions"):
                policy.select = self._recorded(policy.select)
            loop.prefill()
            # Rows leave the batch with the last step, and what they held with them.
            for _ in range(new_tokens - 2):
                loop.step()
                self.reads.append(self._masks(policy, model.config.num_hidden_layers))
            loop.step()
        self.tokens = loop.result().tokens
        self.logits = torch.stack([torch.cat(log.logits[:rows]), *log.logits[rows:]], 1)

    def _masks(self, policy, layers):
        if hasattr(policy, "held_positions"):
            return {layer: by_position(policy.held_positions(layer)) for layer in range(layers)}
        return {layer: by_page(s.pages) for layer, s in self._selections.items() if s}

    def _recorded(self, select):
        def record(layer, *args, **kwargs):
            self._selections[layer] = select(layer, *args, **kwargs)
            return self._selections[layer]

        return record


def by_position(positions):
    """``[rows, heads, capacity]`` positions, -1 for none -> mask ``[rows, heads, tokens]``."""
    positions = positions.long()
    mask = torch.zeros(*positions.shape[:2], max(1, int(positions.max()) + 2), dtype=torch.bool)
    return mask.scatter(-1, positions.where(positions >= 0, torch.tensor(mask.shape[-1] - 1)), True)[..., :-1]


def by_page(pages):
    return by_position(pages).repeat_interleave(PAGE, -1)


@pytest.fixture(scope="module")
def model():
    return build("llama")


@pytest.mark.parametrize(("name", "options"), [*CASES.items(), *OTHERS])
def test_one_sequence(model, name, options):
    prompt = 30 if "protect_prompt" in options else 70
    compared(model, prompts(prompt, seed=3), 60, name, options)


@pytest.mark.parametrize("name", CASES)
def test_a_ragged_batch(model, name):
    # One prompt longer than most budgets, two that reach them while decoding.
    compared(model, prompts(75, 9, 41, seed=4), 50, name, CASES[name])


@pytest.mark.parametrize("name", CASES)
def test_a_long_output(model, name):
    compared(model, prompts(60, seed=5), LONG, name, CASES[name])


MODELS = Path(os.environ.get("LIL_MODELS", Path(__file__).resolve().parents[1] / "models"))
GGUF = MODELS / "SmolLM2-135M-Instruct" / "model.gguf"
TEXT = (
    "Once upon a time, in a village by the sea, there lived a clockmaker who had never seen a clock that he could not "
    "mend. One evening a stranger brought him a watch whose hands ran backwards, and asked him what time it would be "
    "when they met again. The clockmaker opened the case, looked for a long while at the wheels and at the spring, and "
    "said:"
)


@pytest.fixture(scope="module")
def smollm2():
    if not GGUF.exists():
        pytest.skip(f"{GGUF} is missing (make models, or set LIL_MODELS to its folder)")
    from lil_ops.models import load_model

    model, tokenizer = load_model(GGUF, dtype=torch.float32)
    return model, tokenizer(TEXT).input_ids


@pytest.mark.model
@pytest.mark.parametrize("name", SMOLLM2)
def test_smollm2(smollm2, name):
    model, prompt = smollm2
    compared(model, [prompt], 24, name, SMOLLM2[name])


@pytest.mark.parametrize("name", policy_models.RULES)
def test_rules_that_cover_everything_are_dense_attention(model, name):
    ids = prompts(120, seed=6)[0].tolist()
    model.set_attn_implementation("sdpa")
    with torch.inference_mode():
        dense = model(torch.tensor([ids])).logits[0, 39:]
    options = {"window": 8} if name == "snapkv" else {}
    found = policy_models.run(model, name, ids[:40], [*ids[40:], 0], budget=256, **options)
    torch.testing.assert_close(found.logits, dense, atol=1e-4, rtol=1e-4)
    assert all(mask.all() for masks in found.reads for mask in masks)
    assert model.config._attn_implementation == "sdpa"


# Small cases by hand. One KV head unless said, and keys only where a rule looks at them.


def started(rule, prompt, weights=None, q=None, k=None, heads=1):
    """A rule after a prompt: ``weights`` are each query head's ``[P, P]``."""
    weights = torch.zeros(1, prompt, prompt) if weights is None else torch.as_tensor(weights)
    q = torch.zeros(len(weights), prompt, 1) if q is None else q
    rule.start(q.double(), torch.zeros(heads, prompt, 1).double() if k is None else k.double(), weights.double())
    return rule


def read(rule, length, heads=1, q=None, k=None):
    q = torch.zeros(heads, 1) if q is None else q
    mask = rule.read(q.double(), torch.zeros(rule.kv_heads, length, 1).double() if k is None else k.double())
    return [row.nonzero().flatten().tolist() for row in mask]


def held(rule):
    return [row.nonzero().flatten().tolist() for row in rule.held]


def test_sink_by_hand():
    rule = started(Sink(4, sink=1), 3)
    assert [read(rule, n) for n in range(4, 8)] == [[[0, 1, 2, 3]], [[0, 2, 3, 4]], [[0, 3, 4, 5]], [[0, 4, 5, 6]]]
    assert held(started(Sink(6), 20)) == [[0, 1, 2, 3, 18, 19]]


def test_h2o_by_hand():
    # Two query heads share a KV head: column sums 1.875, 0.625, 1, 0.5. Numbers that float32 holds, for an exact tie.
    one = [[1.0, 0, 0, 0], [0.125, 0.125, 0, 0], [0, 0.125, 0.25, 0], [0, 0, 0.25, 0.5]]
    two = [[0.75, 0, 0, 0], [0, 0.375, 0, 0], [0, 0, 0.25, 0], [0, 0, 0.25, 0]]
    rule = started(H2O(3, recent=1), 4, [one, two])
    assert held(rule) == [[0, 1, 2]]
    assert read(rule, 5, heads=2) == [[0, 2, 4]]
    rule.observe(torch.tensor([[0.125, 0, 0.125, 0, 1.5], [0, 0, 0, 0, 0.5]]))
    # 2, 1.125 and 2: the least goes, then the earliest of equals.
    assert read(rule, 6, heads=2) == [[0, 4, 5]]
    rule.observe(torch.tensor([[0, 0, 0, 0, 0, 2.0], [0, 0, 0, 0, 0, 0.5]]))
    assert read(rule, 7, heads=2) == [[4, 5, 6]]
    # With recent=2 the last of the prompt stays though it has the least.
    assert held(started(H2O(3, recent=2), 4, [one, two])) == [[0, 2, 3]]


def test_tova_by_hand():
    last = torch.zeros(2, 4, 4)
    last[:, 3] = torch.tensor([[0.5, 0.1, 0.2, 0.2], [0.1, 0.4, 0.3, 0.2]])
    rule = started(TOVA(3), 4, last, heads=2)
    # Sums over both heads 0.6, 0.5, 0.5, 0.4: two KV heads hold the same.
    assert held(rule) == [[0, 1, 2]] * 2
    assert read(rule, 5, heads=2) == [[0, 2, 4]] * 2
    rule.observe(torch.tensor([[0.5, 0, 0.4, 0, 0.1], [0.5, 0, 0.4, 0, 0.1]]))
    assert read(rule, 6, heads=2) == [[0, 2, 5]] * 2, "the last token written may go"


def test_snapkv_by_hand():
    weights = torch.zeros(1, 8, 8)
    weights[0, 6] = torch.tensor([0.1, 0, 0, 0, 0, 0.3, 0.6, 0])
    weights[0, 7] = torch.tensor([0.1, 0, 0, 0.9, 0, 0, 0, 5.0])
    rule = started(SnapKV(5, window=2, kernel=3), 8, weights)
    # Sums 0.2, 0, 0, 0.9, 0, 0.3 smooth to (0.2, 0.2, 0.9, 0.9, 1.2, 0.3) / 3; of 2 and 3 both fit.
    assert held(rule) == [[2, 3, 4, 6, 7]]
    assert read(rule, 9) == [[2, 3, 4, 6, 7, 8]] and read(rule, 10) == [[2, 3, 4, 6, 7, 8, 9]]
    assert held(started(SnapKV(8, window=2), 8, weights)) == [list(range(8))]


def test_rkv_redundancy_by_hand():
    # 0, 1 and 3 are alike; 2 is like none. Each of the three forgives the latest of the others.
    keys = torch.tensor([[1.0, 0], [2, 0], [0, 1], [1, 0]]).double()
    similarity = torch.tensor([[0, 1, 0, 0], [1, 0, 0, 0], [0, 0, 0, 0], [1, 0, 0, 0]]).double()
    torch.testing.assert_close(redundancy(keys), similarity.mean(0).softmax(-1), atol=1e-7, rtol=0)
    # Below the threshold nothing is forgiven, and it counts; but 1, which has no like, forgives the first.
    keys = torch.tensor([[1.0, 0], [0.4, 0.84**0.5], [1, 0]]).double()
    similarity = torch.tensor([[0, 0.4, 0], [0, 0, 0.4], [0, 0.4, 0]]).double()
    torch.testing.assert_close(redundancy(keys), similarity.mean(0).softmax(-1), atol=1e-7, rtol=0)


def test_rkv_by_hand():
    keys = torch.tensor([[1.0, 0], [1, 0], [0, 1], [1, 0], [0, 1], [-1, 0], [-1, 0], [-1, 0]])[None]
    rule = RKV(3, buffer=2, window=1, kernel=1, lam=0.0)
    queries = torch.zeros(1, 8, 2)
    started(rule, 2, torch.zeros(1, 2, 2), queries[:, :2], keys[:, :2])
    assert [read(rule, n, q=queries[:, 0], k=keys[:, :n]) for n in (3, 4, 5)][-1] == [[0, 1, 2, 3, 4]]
    # Column sums of 0 to 3: 2, 1, 0, 0 and, of the window, 0. The least redundant two stay, and the window.
    assert read(rule, 6, q=queries[:, 0], k=keys[:, :6]) == [[2, 3, 4, 5]]
    assert read(rule, 7, q=queries[:, 0], k=keys[:, :7]) == [[2, 3, 4, 5, 6]]
    rule = RKV(3, buffer=2, window=1, kernel=3, lam=1.0)
    queries[0, 4] = torch.tensor([0.0, 9.0])
    # The last query wants 2; pooling lifts its neighbours with it, and of equals the later stays.
    started(rule, 5, torch.zeros(1, 5, 5), queries[:, :5], keys[:, :5])
    assert held(rule) == [[2, 3, 4]]


def test_quest_by_hand():
    k = torch.tensor([[1.0, -5], [-1, 5], [2, 0], [2, 0], [0, 0], [0, 0]])[None]
    rule = started(Quest(4, page_size=2), 5, torch.zeros(1, 5, 5), k=k[:, :5])
    # Bounds for q = (1, 1): 1 + 5, 2 + 0; the current page always.
    assert read(rule, 6, q=torch.ones(1, 2), k=k) == [[0, 1, 4, 5]]
    assert read(rule, 6, q=torch.tensor([[1.0, 0]]), k=k) == [[2, 3, 4, 5]]


def test_infllm_by_hand():
    # Two KV heads, pages of 2, one representative, a window of 3.
    k = torch.tensor([[[3.0], [1], [1], [2], [0], [0], [0], [0]], [[1.0], [4], [2], [5], [0], [0], [0], [0]]])
    weights = torch.zeros(2, 5, 5)
    weights[0, 2, 0], weights[0, 3, 0], weights[0, 2, 1] = 0.1, 9.0, 0.2  # the 9 comes after 0 has left the window
    weights[1, 2, 0] = 0.3
    weights[:, 4, 2], weights[0, 4, 3] = 0.4, 0.3
    rule = InfLLM(8, sink=0, recent=3, representatives=1, page_size=2)
    started(rule, 5, weights, k=k[:, :5], heads=2)
    assert rule.weight[:, :4].tolist() == [pytest.approx([0.1, 0.2, 0.4, 0.3]), pytest.approx([0.3, 0, 0.4, 0])]
    assert read(rule, 6, heads=2, q=torch.ones(2, 1), k=k[:, :6]) == [list(range(6))] * 2
    assert len(rule.chosen) == 1 and rule.chosen[0].flatten().tolist() == [1, 1]
    rule.observe(torch.tensor([[0, 0, 0, 0.5, 0, 0]] * 2))
    rule.budget = 6
    assert read(rule, 7, heads=2, q=torch.ones(2, 1), k=k[:, :7]) == [[2, 3, 4, 5, 6]] * 2
    # Token 3 got 0.5 while in the window of the last query: it represents page 1, 2 + 5 against 1 + 1.
    assert rule.chosen[1].flatten().tolist() == [2, 5]


def test_less_is_more_by_hand():
    selecting = LessIsMore(8, sink=0, recent=1, page_size=2, select_layers=(0,), dense_layers=0)
    reading = LessIsMore(8, sink=0, recent=1, page_size=2, select_layers=(0,), dense_layers=0, layer=1, below=selecting)
    for rule in (selecting, reading):
        started(rule, 11, torch.zeros(2, 11, 11))
    assert read(selecting, 12, heads=2) == [list(range(12))]
    # Pages 0 to 4 in head 0: 1, 3, 0, ...; in head 1: 1, 4, 2, ...; the current page is no candidate.
    selecting.observe(torch.tensor([[2, 0, 3, 3, 1, 0, 3, 1, 0, 0, 9, 9], [0, 0, 4, 0, 0, 2, 1, 0, 3, 0, 9, 9.0]]))
    assert read(reading, 12, heads=2) == [[2, 3, 6, 7, 8, 9, 10, 11]]


def test_raas_by_hand():
    rule = started(RaaS(8, page_size=2), 3)
    assert read(rule, 4) == [[0, 1, 2, 3]]
    rule.observe(torch.tensor([[0.1, 0.1, 0.4, 0.4]]))
    for n in (5, 6, 7, 8):
        assert read(rule, n) == [list(range(n))]
        # Page 2 is among the better half (two of three or four), then page 3 is opened and page 2 stays better.
        rule.observe(torch.tensor([[0.3, 0.3, 0, 0, 0.2, 0.2, 0, 0][:n]]))
    assert rule.stamp.tolist() == [[8, 4, 8, 7]]
    assert read(rule, 9) == [[0, 1, 2, 3, 4, 5, 8]], "the prompt's pages never go, though page 1 is the oldest"
    rule.observe(torch.tensor([[0.5, 0, 0, 0, 0, 0, 0, 0, 0.5]]))
    assert read(rule, 10) == [[0, 1, 2, 3, 4, 5, 8, 9]]
    assert read(rule, 11) == [[0, 1, 2, 3, 8, 9, 10]]


def test_ties():
    scores = torch.tensor([1.0, 2, 1, 2])
    assert policy_models.top(scores, 3).tolist() == [True, True, False, True]
    assert policy_models.top(scores, 3, later=True).tolist() == [False, True, True, True]
    assert math.isinf(Sink(4).closest)

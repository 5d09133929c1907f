"""The policies: making one by name, what their options may be, and exactly which pages each reads."""

import pytest
import torch
from tiny_models import LogitsLog, build, prompts

from lil_ops import DecodeLoop, Guardian, generate, policies, reference
from lil_ops.cache import PagedKVCache
from lil_ops.policies import Full, Quest, Sink

HEADS, DIM, PAGE, GROUP = 2, 64, 8, 3
SCALE = 0.2
PROMPTS = [20, 3]
OPTIONS = "expected one of budget, sink, recent, protect_prompt, dense_layers"


def filled(policy):
    """A cache of one layer on which a policy has begun: the prompts, 70 tokens more each, and room for two pages."""
    cache = PagedKVCache(
        num_layers=1, kv_heads=HEADS, head_dim=DIM, batch=2, max_tokens=max(PROMPTS) + 70 + 2 * PAGE,
        page_size=PAGE, summary_mode=policy.summary_mode, summary_dtype=policy.summary_dtype,
    )  # fmt: skip
    g = torch.Generator().manual_seed(0)
    policy.begin(cache, PROMPTS)
    for counts, prompt in ((PROMPTS, True), ([69, 69], False), ([1, 1], False)):
        cache.begin_step([0, 1], counts, prompt=prompt)
        cache.append(0, *torch.randn(2, sum(counts), HEADS, DIM, generator=g))
    return cache


def roomy(policy):
    """An empty cache of one layer, as the policy wants it."""
    tokens = max(PROMPTS) + 100
    rooms = policy.rooms(1, tokens, PAGE)
    return PagedKVCache(num_layers=1, kv_heads=HEADS, head_dim=DIM, batch=2, max_tokens=tokens, page_size=PAGE,
                        summary_mode=policy.summary_mode, rooms=rooms)  # fmt: skip


def selected(policy, cache, layer=0):
    """The pages of each row and KV head."""
    q = torch.randn(len(cache.lengths), HEADS * GROUP, DIM, generator=torch.Generator().manual_seed(1))
    selection = policy.select(layer, q, cache, SCALE)
    if selection is None:
        return None
    pages = [[head[head >= 0].tolist() for head in row] for row in selection.pages]
    assert selection.counts.tolist() == [list(map(len, row)) for row in pages]
    return pages


def test_get_by_name_and_by_object():
    assert isinstance(policies.get("full"), Full)
    quest = policies.get("quest", budget=64, sink=4, recent=8, protect_prompt=True, dense_layers=1)
    assert isinstance(quest, Quest) and (quest.budget, quest.sink, quest.recent) == (64, 4, 8)
    assert quest.protect_prompt and quest.dense_layers == 1
    assert policies.get(quest) is quest
    with pytest.raises(ValueError, match=r"policy quest: options \['budget'\] were given beside a policy object"):
        policies.get(quest, budget=64)
    assert all(policy.rule and policy.source and policy.name == name for name, policy in policies.POLICIES.items())


def test_unknown_names():
    with pytest.raises(ValueError, match=r"unknown policy 'qest': expected one of full, sink, .*quest.*mean 'quest'\?"):
        policies.get("qest")
    with pytest.raises(ValueError, match=r"unknown policy 'zzz': expected one of [a-z0-9, -]+$"):
        policies.get("zzz")


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("full", {"budget": 64}, "policy full: unknown option 'budget': expected none$"),
        ("sink", {"budget": 64, "top_k": 4}, f"policy sink: unknown option 'top_k': {OPTIONS}$"),
        ("quest", {"sinks": 4}, f"policy quest: unknown option 'sinks': {OPTIONS}, scoring, summary_dtype$"),
        ("quest", {"budget": 64, "scoring": "max"}, "quest: scoring: expected 'minmax' or 'meanstd', got 'max'"),
        ("quest", {"budget": 64, "summary_dtype": "fp8"}, "quest: summary_dtype: expected None or 'float8', got 'fp8'"),
        ("quest", {}, r"policy quest: budget: expected a number of tokens \(budget=...\), got none$"),
        ("quest", {"budget": "64"}, "policy quest: budget: expected a whole number, or a share, got '64'"),
        ("quest", {"budget": 1.5}, r"quest: budget: expected a share above 0 and up to 1, got 1.5"),
        ("quest", {"budget": [64, 0.0]}, r"quest: budget: expected a share above 0 and up to 1, got 0.0"),
        ("sink", {"budget": [64, 2]}, r"sink: budget: expected at least sink \+ recent \+ 1 = 6 tokens, got 2"),
        ("sink", {"budget": 64, "sink": 4.5}, "policy sink: sink: expected a whole number, got 4.5"),
        ("quest", {"budget": 64, "sink": -1}, "policy quest: sink: expected at least 0, got -1"),
        ("quest", {"budget": 64, "recent": 0}, "policy quest: recent: expected at least 1, got 0"),
        ("quest", {"budget": 64, "dense_layers": -1}, "policy quest: dense_layers: expected at least 0, got -1"),
        ("quest", {"budget": 1}, r"quest: budget: expected at least sink \+ recent \+ 1 = 2 tokens, got 1"),
        (
            "sink",
            {"budget": 13, "recent": 9},
            r"sink: budget: expected at least sink \+ recent \+ 1 = 14 tokens, got 13",
        ),
    ],
)
def test_bad_options(name, options, message):
    with pytest.raises(ValueError, match=message):
        policies.get(name, **options)


def test_the_smallest_budgets_are_taken():
    assert policies.get("quest", budget=2).budget == 2
    assert policies.get("sink", budget=14, recent=9).budget == 14


@pytest.mark.parametrize(
    ("options", "least"),
    [
        ({"sink": 0}, 8),
        ({"sink": 1}, 16),
        ({"sink": 8, "recent": 2}, 24),
        ({"sink": 9, "recent": 9}, 32),
        ({"sink": 0, "recent": 10}, 24),
    ],
)
def test_begin_wants_room_for_the_pages_always_read(options, least):
    """`recent` tokens may start anywhere in a page: r of them touch up to 1 + ceil((r - 1) / page) pages."""
    filled(Quest(least, **options))
    with pytest.raises(ValueError, match=f"policy quest: budget: expected at least {least} tokens .* got {least - 1}"):
        filled(Quest(least - 1, **options))


# 20 tokens touch three pages; the recent ones touch others. Or, token by token, nothing but themselves.
@pytest.mark.parametrize(
    ("name", "recent", "least"),
    [("quest", 1, 32), ("quest", 2, 40), ("quest", 10, 48), ("raas", 2, 40), ("sink", 1, 21), ("h2o", 10, 30)],
)
def test_begin_wants_room_for_a_protected_prompt(name, recent, least):
    policy = policies.get(name, budget=least, recent=recent, protect_prompt=True)
    policy.begin(roomy(policy), PROMPTS)
    message = rf"expected at least {least} tokens to protect a prompt of 20.* recent {recent} .* got {least - 1}"
    policy = policies.get(name, budget=least - 1, recent=recent, protect_prompt=True)
    with pytest.raises(ValueError, match=message):
        policy.begin(roomy(policy), PROMPTS)


def test_full_reads_everything():
    assert Full().reads_all(0) and Full().reads_all(99)


def test_a_budget_of_each_layer():
    policy = Quest
    cache = PagedKVCache(num_layers=3, kv_heads=HEADS, head_dim=DIM, batch=1, max_tokens=100, page_size=PAGE,
                         summary_mode="minmax")  # fmt: skip
    each = policy([24, 0.5, 1.0], dense_layers=0)
    each.begin(cache, [90])
    assert [each.budget_of(layer) for layer in range(3)] == [24, 50, 100]
    g = torch.Generator().manual_seed(0)
    for count in (89, 1):
        cache.begin_step([0], [count], prompt=True)
        for layer in range(3):
            cache.append(layer, *torch.randn(2, count, HEADS, DIM, generator=g))
    assert [[len(pages) for pages in selected(each, cache, layer)[0]] for layer in range(3)] == [
        [3] * 2,
        [6] * 2,
        [12] * 2,
    ]
    for layer, budget in enumerate([24, 50, 100]):
        alone = policy(budget, dense_layers=0)
        alone.begin(cache, [90])
        assert selected(alone, cache, layer) == selected(each, cache, layer)
    with pytest.raises(ValueError, match=f"{policy.name}: budget: expected one entry for each of 3 layers, got 2"):
        policy([24, 0.5]).begin(cache, [90])
    with pytest.raises(ValueError, match=f"{policy.name}: budget: expected at least .* tokens .* got 5$"):
        policy(0.05).begin(cache, [90])


def test_dense_layers():
    assert [Quest(32).reads_all(layer) for layer in range(3)] == [True, True, False]
    assert [Sink(32, dense_layers=1).reads_all(layer) for layer in range(3)] == [True, False, False]
    assert Quest(32).summary_mode == "minmax" and Sink(32).summary_mode is None


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"sink": 9},
        {"recent": 12},
        {"protect_prompt": True},
        {"scoring": "meanstd"},
        {"summary_dtype": "float8"},
        {"scoring": "meanstd", "summary_dtype": "float8"},
    ],
)
def test_quest_reads_the_pages_of_the_highest_score(options):
    policy = Quest(48, dense_layers=0, **options)
    cache = filled(policy)
    found = selected(policy, cache)
    q = torch.randn(2, HEADS * GROUP, DIM, generator=torch.Generator().manual_seed(1))
    step = cache.step_of(0)
    mode = options.get("scoring", "minmax")
    scores = reference.score_pages(
        q, cache.summary[0], step.page_table, step.seq_lens, PAGE, scale=SCALE, summary_mode=mode
    )
    for row, length in enumerate(cache.lengths):
        last = -(-length // PAGE)
        head = max(options.get("sink", 0), PROMPTS[row] if "protect_prompt" in options else 0)
        first_recent = (length - options.get("recent", 1)) // PAGE
        always = {*range(-(-head // PAGE)), *range(first_recent, last)}
        for h in range(HEADS):
            rest = sorted(set(range(last)) - always, key=lambda page: -scores[row, h, page])
            assert found[row][h] == sorted([*always, *rest[: 6 - len(always)]])
    assert found[0][0] != found[0][1], "heads must differ for the comparison to mean anything"


def test_quest_with_a_covering_budget_reads_every_page():
    policy = Quest(96, dense_layers=0)
    assert selected(policy, filled(policy)) == [[list(range(12))] * HEADS, [list(range(10))] * HEADS]


class Apart(Quest):
    """Quest in the operators of its own, as `select` is another one."""

    def select(self, *args):
        self.selections = getattr(self, "selections", 0) + 1
        return super().select(*args)


@pytest.mark.parametrize("options", [{}, {"sink": 9, "recent": 12}, {"scoring": "meanstd"}, {"protect_prompt": True}])
@pytest.mark.parametrize("model_type", ["llama", "gemma2"])
def test_quest_in_one_operator_has_the_bits_of_its_parts(model_type, options, one_thread):
    model, found = build(model_type), []
    guardian = Guardian(8, 0, loss_aware=True, unit="bits")
    for policy in (Quest, Apart):
        policy = policy(64, dense_layers=1, **options)
        decode = {"max_new_tokens": 40, "policy": policy, "guardian": guardian, "eos_token_id": (), "page_size": 8}
        with DecodeLoop(model, prompts(30, 17), **decode) as loop, LogitsLog(model) as log:
            lost = [loop.cache.lost_bits.clone() for _ in loop]
        found.append((torch.stack(lost), *log.logits))
    assert policy.selections > 0 and (found[0][0] > 0).any()
    for one, parts in zip(*found, strict=True):
        assert torch.equal(one, parts)


def test_a_selection_of_ones_own_is_asked_for(one_thread):
    """Whether a subclass has it, or the object."""
    calls, policy = [], Quest(64, dense_layers=0)
    select = policy.select
    policy.select = lambda *args: calls.append(args[0]) or select(*args)
    generate(build("llama"), prompts(30), max_new_tokens=3, policy=policy)
    assert calls == 2 * [0, 1, 2, 3]


@pytest.mark.parametrize("policy", ["sink", "h2o", "tova", "raas"])
def test_bounded_policies_stay_bounded(policy):
    """440 tokens in 64: the pool never maps more than the budget a head, and rows are used again by others."""
    model = build("llama")
    prompt = prompts(40)
    result = generate(model, prompt, max_new_tokens=400, policy=policy, budget=64, eos_token_id=())
    page = 2 * 64 * 16 * 2 * 4  # K and V of a page: heads 2, head_dim 64, 16 tokens, float32
    assert len(result.tokens[0]) == 400 and result.kv_bytes_peak == 4 * 4 * page
    with DecodeLoop(model, prompts(40, 12), max_new_tokens=8, policy=policy, budget=64, eos_token_id=()) as loop:
        for _ in loop:
            pass
        assert loop.cache.kv.bytes_in_use == 0


def test_a_long_prompt_is_never_held_whole():
    result = generate(build("llama"), prompts(300), max_new_tokens=3, policy="h2o", budget=32)
    assert result.kv_bytes_peak == 4 * 2 * (2 * 64 * 16 * 2 * 4)


def test_lessismore_selects_behind_its_dense_layers():
    with pytest.raises(ValueError, match=r"select_layers: expected layers from 2 to 3, got \[1\]"):
        generate(build("llama"), prompts(20), max_new_tokens=2, policy="lessismore", budget=64, select_layers=[1])


@pytest.mark.parametrize(
    "name, option, value",
    [
        ("raas", "share", "abc"),
        ("raas", "share", 0),
        ("rkv", "mix", "abc"),
        ("rkv", "threshold", None),
        ("rkv", "mix", float("nan")),
        ("lessismore", "select_layers", 4),
        ("lessismore", "select_layers", ["a"]),
        ("quest", "protect_prompt", "abc"),
        ("sink", "protect_prompt", 1),
    ],
)
def test_options_of_another_kind(name, option, value):
    with pytest.raises(ValueError, match=rf"policy {name}: {option}.*: expected .*, got {value!r}"):
        policies.get(name, budget=64, **{option: value})

"""The policies: making one by name, what their options may be, and exactly which pages each reads."""

import pytest
import torch

from lil_ops import policies, reference
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
        page_size=PAGE, summary_mode=policy.summary_mode,
    )  # fmt: skip
    g = torch.Generator().manual_seed(0)
    policy.begin(cache, PROMPTS)
    for counts, prompt in ((PROMPTS, True), ([69, 69], False), ([1, 1], False)):
        cache.begin_step([0, 1], counts, prompt=prompt)
        cache.append(0, *torch.randn(2, sum(counts), HEADS, DIM, generator=g))
    policy.begin_step(cache)
    return cache


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
    with pytest.raises(ValueError, match=r"unknown policy 'qest': expected one of full, sink, quest.*mean 'quest'\?"):
        policies.get("qest")
    with pytest.raises(ValueError, match=r"unknown policy 'zzz': expected one of [a-z0-9, -]+$"):
        policies.get("zzz")


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("full", {"budget": 64}, "policy full: unknown option 'budget': expected none$"),
        ("sink", {"budget": 64, "top_k": 4}, f"policy sink: unknown option 'top_k': {OPTIONS}$"),
        ("quest", {"sinks": 4}, f"policy quest: unknown option 'sinks': {OPTIONS}, scoring$"),
        ("quest", {"budget": 64, "scoring": "max"}, "quest: scoring: expected 'minmax' or 'meanstd', got 'max'"),
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
@pytest.mark.parametrize("name", ["sink", "quest"])
def test_begin_wants_room_for_the_pages_always_read(name, options, least):
    """`recent` tokens may start anywhere in a page: r of them touch up to 1 + ceil((r - 1) / page) pages."""
    filled(policies.get(name, budget=least, **options))
    with pytest.raises(ValueError, match=f"policy {name}: budget: expected at least {least} tokens .* got {least - 1}"):
        filled(policies.get(name, budget=least - 1, **options))


@pytest.mark.parametrize(("recent", "least"), [(1, 32), (2, 40), (10, 48)])
@pytest.mark.parametrize("name", ["sink", "quest"])
def test_begin_wants_room_for_a_protected_prompt(name, recent, least):
    # 20 tokens touch three pages; the recent ones touch others.
    filled(policies.get(name, budget=least, recent=recent, protect_prompt=True))
    message = rf"expected at least {least} tokens to protect a prompt of 20.* recent {recent} .* got {least - 1}"
    with pytest.raises(ValueError, match=message):
        filled(policies.get(name, budget=least - 1, recent=recent, protect_prompt=True))


def test_full_reads_everything():
    policy = Full()
    assert selected(policy, filled(policy)) is None


# 90 and 73 tokens: pages 0 to 11 and 0 to 9.
@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"budget": 32}, [[0, 9, 10, 11], [0, 7, 8, 9]]),
        ({"budget": 39}, [[0, 9, 10, 11], [0, 7, 8, 9]]),
        ({"budget": 32, "sink": 0}, [[8, 9, 10, 11], [6, 7, 8, 9]]),
        ({"budget": 32, "sink": 9}, [[0, 1, 10, 11], [0, 1, 8, 9]]),
        ({"budget": 40, "protect_prompt": True}, [[0, 1, 2, 10, 11], [0, 6, 7, 8, 9]]),
        ({"budget": 96}, [list(range(12)), list(range(10))]),
        ({"budget": 1000}, [list(range(12)), list(range(10))]),
    ],
)
def test_sink_reads_the_first_and_the_last_pages(options, expected):
    policy = Sink(**options)
    assert selected(policy, filled(policy)) == [[row] * HEADS for row in expected]


@pytest.mark.parametrize("policy", [Sink, Quest])
def test_a_budget_of_each_layer(policy):
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
    each.begin_step(cache)
    assert [[len(pages) for pages in selected(each, cache, layer)[0]] for layer in range(3)] == [
        [3] * 2,
        [6] * 2,
        [12] * 2,
    ]
    for layer, budget in enumerate([24, 50, 100]):
        alone = policy(budget, dense_layers=0)
        alone.begin(cache, [90])
        alone.begin_step(cache)
        assert selected(alone, cache, layer) == selected(each, cache, layer)
    with pytest.raises(ValueError, match=f"{policy.name}: budget: expected one entry for each of 3 layers, got 2"):
        policy([24, 0.5]).begin(cache, [90])
    with pytest.raises(ValueError, match=f"{policy.name}: budget: expected at least .* tokens .* got 5$"):
        policy(0.05).begin(cache, [90])


def test_sink_decides_once_a_step():
    policy = Sink(32, dense_layers=1)
    cache = filled(policy)
    assert selected(policy, cache, layer=0) is None
    before = selected(policy, cache, layer=1)
    for _ in range(PAGE):
        cache.begin_step([0, 1], [1, 1])
        policy.begin_step(cache)
    assert selected(policy, cache, layer=1) == [[[0, *(page + 1 for page in pages[1:])]] * HEADS for pages, _ in before]
    # A row that left the batch takes nothing along.
    cache.begin_step([1], [1])
    policy.begin_step(cache)
    assert policy.select(1, torch.empty(1, HEADS * GROUP, DIM), cache, SCALE).pages.shape == (1, HEADS, 4)


def test_quest_reads_dense_layers_whole():
    policy = Quest(32)
    cache = filled(policy)
    assert [selected(policy, cache, layer) is None for layer in (0, 1)] == [True, True]
    assert Quest(32).summary_mode == "minmax" and Sink(32).summary_mode is None


@pytest.mark.parametrize(
    "options",
    [{}, {"sink": 9}, {"recent": 12}, {"protect_prompt": True}, {"scoring": "meanstd"}],
)
def test_quest_reads_the_pages_of_the_highest_score(options):
    policy = Quest(48, dense_layers=0, **options)
    cache = filled(policy)
    found = selected(policy, cache)
    q = torch.randn(2, HEADS * GROUP, DIM, generator=torch.Generator().manual_seed(1))
    step = cache.step
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

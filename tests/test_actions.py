"""What a stop rule brings about: an answer, a rescue, the end."""

import pytest
import torch
from tiny_models import LogitsLog, build, prompts

from lil_ops import Answer, DecodeLoop, Guardian, Rescue, StopReason, TokenBudget, generate
from lil_ops.actions import ActionEvent, Course

SPARSE = {"policy": "quest", "budget": 32, "dense_layers": 0, "page_size": 8}


@pytest.fixture(scope="module")
def model():
    return build("llama")


def test_an_answer_is_what_the_model_says_behind_the_forced_tokens(model):
    sequences = prompts(20, 9)
    forced = (7, 8, 9)
    result = generate(
        model, sequences, guardian=TokenBudget(10), action=Answer(forced, max_tokens=12), max_new_tokens=60
    )
    for row, tokens in enumerate(result.tokens):
        thought = generate(model, [sequences[row]], max_new_tokens=10).tokens[0]
        before = torch.tensor([*sequences[row], *thought, *forced])
        assert tokens[:13] == [*thought, *forced]
        assert tokens[13:] == generate(model, [before], max_new_tokens=12).tokens[0]
        assert result.events[row] == [ActionEvent(10, "answer")]
    assert result.stop_reason == [StopReason.LENGTH] * 2


def test_an_answer_ends_at_its_end_of_sequence_and_within_the_whole_length(model):
    free = generate(model, prompts(20), guardian=TokenBudget(4), action=Answer((7,), 30), max_new_tokens=25)
    assert len(free.tokens[0]) == 25 and free.stop_reason == [StopReason.LENGTH]
    end = next(token for i, token in enumerate(free.tokens[0]) if i > 8 and token not in [*free.tokens[0][:i], 7])
    # A forced token ends nothing, whatever it is.
    for action in (Answer((7,), 30), Answer((end,), 30)):
        result = generate(
            model, prompts(20), guardian=TokenBudget(4), action=action, max_new_tokens=25, eos_token_id=[end, 7]
        )
        assert len(result.tokens[0]) > 5
    assert len(generate(model, prompts(20), guardian=TokenBudget(25), action=action, max_new_tokens=25).tokens[0]) == 25


def test_the_ids_of_an_answer_from_a_tokenizer():
    class Tokenizer:
        chat_template = "...{% if thinking %}</think>{% endif %}"

        def __call__(self, text, add_special_tokens):
            return type("Encoding", (), {"input_ids": [len(text)]})

    assert Answer.from_tokenizer(Tokenizer()) == Answer([len("\n</think>\n\n")])
    assert Answer.from_tokenizer(Tokenizer(), "Answer:", 9) == Answer([7], 9)
    Tokenizer.chat_template = None
    with pytest.raises(ValueError, match="Answer: text: the chat template has no </think>"):
        Answer.from_tokenizer(Tokenizer())


@pytest.mark.parametrize("budget", [None, 1024])
def test_a_rescue_reads_everything_for_one_interval(model, budget):
    """Ends always fire: the first brings the rescue, the second the end. Steps between are those of dense attention."""
    sequences, rule = prompts(40, 21), Guardian(interval=6, threshold=1e6)
    with LogitsLog(model) as log:
        result = generate(model, sequences, guardian=rule, action=Rescue(budget), max_new_tokens=60, **SPARSE)
    assert [len(tokens) for tokens in result.tokens] == [12, 12]
    assert result.events == [[ActionEvent(6, "rescue")]] * 2
    assert result.stop_reason == [StopReason.GUARDIAN] * 2
    before = [torch.tensor([*p, *t[:6]]) for p, t in zip(sequences, result.tokens, strict=True)]
    # Up to the rescue the sequences were built sparsely: the same cache, read densely from there on.
    loop = DecodeLoop(model, sequences, max_new_tokens=12, eos_token_id=[], **SPARSE)
    with loop, LogitsLog(model) as again:
        for step, _ in enumerate(loop):
            if step == 5:
                loop.cache.raised = torch.ones(2, dtype=torch.bool)
    assert loop.result().tokens == result.tokens and len(before) == 2
    assert all(map(torch.equal, log.logits, again.logits))
    # And it made a difference.
    plain = generate(model, sequences, max_new_tokens=12, **SPARSE)
    assert plain.tokens != result.tokens


def test_a_raised_row_is_dense_and_leaves_others_alone(model):
    sequences = prompts(50, 50, 33)
    logs = {}
    for name, raised in {"none": [0, 0, 0], "first": [1, 0, 0], "all": [1, 1, 1]}.items():
        loop = DecodeLoop(model, sequences, max_new_tokens=2, eos_token_id=[], **SPARSE)
        with loop, LogitsLog(model) as log:
            loop.cache.raised = torch.tensor(raised, dtype=torch.bool)
            list(loop)
        logs[name] = log.logits[-1]
    loop = DecodeLoop(model, sequences, max_new_tokens=2, eos_token_id=[], page_size=8)
    with loop, LogitsLog(model) as log:
        list(loop)
    assert torch.equal(logs["all"], log.logits[-1])
    assert torch.equal(logs["first"], torch.cat([logs["all"][:1], logs["none"][1:]]))


def test_a_raised_budget_reads_the_best_pages_of_it(model):
    logs = []
    for budget, raised in ((32, 48), (48, 0), (32, 16), (32, 0)):
        loop = DecodeLoop(model, prompts(70), max_new_tokens=3, eos_token_id=[], **{**SPARSE, "budget": budget})
        with loop, LogitsLog(model) as log:
            loop.cache.raised, loop.cache.raised_budget = torch.tensor([raised > 0]), raised
            list(loop)
        logs.append(log.logits[1])
    assert torch.equal(logs[0], logs[1]) and not torch.equal(logs[0], logs[3])
    assert torch.equal(logs[2], logs[3])  # never less than the policy's own


@pytest.mark.parametrize("policy", ["quest", "infllm", "lessismore"])
def test_policies_that_hold_everything_can_be_rescued(model, policy):
    options = {"policy": policy, "budget": 64, "max_new_tokens": 40}
    result = generate(model, prompts(70, 90), guardian=Guardian(8, 1e6), action=Rescue(), **options)
    assert [len(tokens) for tokens in result.tokens] == [16, 16]


def test_the_course_of_a_rescue():
    course = Course(Rescue(limit=2, then=Answer((1, 2), 9)), interval=10)
    assert course.fired(10) and course.rescued_until == 20
    course.went_on(15)
    assert course.rescued_until == 20
    course.went_on(20)
    assert course.rescued_until is None
    assert course.fired(40) and course.rescued_until == 50
    assert course.fired(50) and course.rescued_until is None and list(course.forced) == [1, 2] and course.limit == 61
    assert course.fired(60)  # no rule looks at an answer
    assert course.events == [(10, "rescue"), (20, "recovered"), (40, "rescue"), (50, "answer")]
    course = Course(Rescue(limit=1), interval=10)
    assert course.fired(10)
    course.went_on(20)
    assert not course.fired(30)
    assert not Course(None, interval=10).fired(10)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"action": Rescue()}, "action: expected a stop rule beside it"),
        ({"action": Rescue(), "guardian": Guardian(), "policy": "sink", "budget": 32}, "policy sink has forgotten"),
        ({"action": Rescue(64), "guardian": Guardian(), "policy": "infllm", "budget": 64}, "infllm has no page scores"),
    ],
)
def test_an_action_that_cannot_be(model, options, message):
    with pytest.raises(ValueError, match=message):
        generate(model, prompts(9), **options)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Answer(()), "Answer: tokens: expected at least one id"),
        (lambda: Answer((1,), 0), "Answer: max_tokens: expected a whole number from 1 to .*, got 0"),
        (lambda: Answer((1,), 1.5), "Answer: max_tokens: expected a whole number from 1 to .*, got 1.5"),
        (lambda: Rescue(0), "Rescue: budget: expected a whole number from 1 to .*, got 0"),
        (lambda: Rescue(limit=2.5), "Rescue: limit"),
        (lambda: Rescue(limit=None), "Rescue: limit: .*, got None"),
    ],
)
def test_bad_options(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(
    ("action", "message"),
    [
        (lambda: Answer((300,), 3), "Answer: tokens: expected ids from 0 to"),
        (lambda: Rescue(then=Answer((5, -1), 3)), "Answer: tokens: expected ids from 0 to"),
        (lambda: Rescue(then=Rescue()), "Rescue: then: expected an Answer or None"),
        (lambda: (1, 2), "action: expected an Answer, a Rescue or None"),
    ],
)
def test_what_cannot_be_done_at_the_stop_is_refused_before_any_work(action, message):
    model = build("llama")
    with pytest.raises(ValueError, match=message):
        generate(model, prompts(9), max_new_tokens=5, guardian=TokenBudget(4), action=action())


def test_an_answer_in_a_tensor():
    assert Answer(torch.tensor([3, 4]), 3) == Answer((3, 4), 3)

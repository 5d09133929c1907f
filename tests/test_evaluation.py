"""Evaluation, below the command line: problems, answers, names, statistics, replay, the document."""

import json
import math
import sys
from types import SimpleNamespace

import numpy as np
import pytest

from lil_ops import _C, Answer, Guardian, Rescue
from lil_ops.evaluation import data, grid, stops, summary
from lil_ops.evaluation.answers import checker, last_boxed
from lil_ops.evaluation.document import Document, Heading, Paragraph, Table
from lil_ops.evaluation.extras import MissingExtraError
from lil_ops.evaluation.replay import Output, Stop, effect, replay, stops_at
from lil_ops.evaluation.runner import seed_of
from lil_ops.evaluation.statistics import mean, ratio


def json_lines(path, *records):
    path.write_text("".join(f"{record if isinstance(record, str) else json.dumps(record)}\n" for record in records))
    return str(path)


def test_problems_of_every_layout(tmp_path):
    source = json_lines(
        tmp_path / "mixed.jsonl",
        {"question": "a?", "answer": "2 + 2 = 4.\n#### 1,234"},
        {"problem": "b?", "solution": r"so \boxed{\frac{1}{2}} or rather \boxed{x^{2}}."},
        "",
        {"prompt": "c?", "answer": 7, "unique_id": "algebra/1"},
    )
    problems = data.load(source)
    assert [(p.id, p.question, p.answer) for p in problems] == [
        ("0", "a?", "1,234"),
        ("1", "b?", "x^{2}"),
        ("algebra/1", "c?", "7"),
    ]
    assert data.load(source, limit=2) == problems[:2]
    assert data.fingerprint(problems) != data.fingerprint(problems[:2])
    fields = {"q": "d?", "a": "x", "name": 5, "question": "not this"}
    (problem,) = data.load(json_lines(tmp_path / "own.jsonl", fields), "q", "a", "name")
    assert (problem.id, problem.question, problem.answer) == ("5", "d?", "x")


@pytest.mark.parametrize(
    "records, message",
    [
        ([], "no problems in it"),
        (["{"], "line 1: not JSON"),
        (["[1]"], "line 1: expected an object"),
        ([{"question": "a", "answer": "1"}, {"question": "b"}], "line 2: expected the answer .* in field 'answer' or"),
        ([{"text": "a", "answer": "1"}], "expected the question .* got the fields 'text', 'answer'"),
        ([{"question": "a", "answer": [1]}], "expected the answer as text or number"),
        ([{"question": "a\ud800b", "answer": 1}], "expected text in field 'question', got half of a character"),
        ([{"question": "a", "answer": "so ####  "}], "line 1: the answer is empty"),
        ([{"id": 1, "question": "a", "answer": "1"}] * 2, "expected each id once, got '1' twice"),
    ],
)
def test_problems_that_are_not_as_expected(tmp_path, records, message):
    with pytest.raises(ValueError, match=message):
        data.load(json_lines(tmp_path / "wrong.jsonl", *records))


def test_sources_that_are_not_there(tmp_path, monkeypatch):
    (tmp_path / "bytes.jsonl").write_bytes(b"\xff\xfe\n")
    for source, message in [
        (f"{tmp_path}/none.jsonl", "none.jsonl: No such file"),
        (f"{tmp_path}", "Is a directory"),
        (f"{tmp_path}/bytes.jsonl", "not UTF-8"),
        ("reasoning_gym:chain_sum:1", "expected reasoning_gym:NAME:SEED:COUNT"),
        ("hf:name", "expected hf:NAME:SPLIT"),
    ]:
        with pytest.raises(ValueError, match=message):
            data.load(source)
    for source, library, extra in [
        ("reasoning_gym:chain_sum:1:2", "reasoning_gym", "reasoning-gym"),
        ("hf:name:test", "datasets", "datasets"),
    ]:
        monkeypatch.setitem(sys.modules, library, None)
        with pytest.raises(MissingExtraError, match=rf"needs {library}: pip install lil-ops\[{extra}\]"):
            data.load(source)


def test_hugging_face(monkeypatch):
    def load_dataset(*name, split):
        if split != "test":
            raise RuntimeError("no such split\nand much more")
        return [{"problem": "/".join(name), "answer": 4}]

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    assert data.load("hf:owner/name:test") == [data.Problem("0", "owner/name", "4")]
    assert data.load("hf:owner/name:main:test")[0].question == "owner/name/main"
    with pytest.raises(ValueError, match=r"^hf:name:train: no such split$"):
        data.load("hf:name:train")


def test_reasoning_gym():
    pytest.importorskip("reasoning_gym")
    problems = data.load("reasoning_gym:chain_sum:3:4")
    assert len(problems) == 4 and problems == data.load("reasoning_gym:chain_sum:3:4")
    assert problems != data.load("reasoning_gym:chain_sum:4:4")
    assert all(checker("number").equal(problem.answer, problem.answer) for problem in problems)
    with pytest.raises(ValueError, match="no_such_task"):
        data.load("reasoning_gym:no_such_task:1:1")


@pytest.mark.parametrize(
    "name, right, text, answer, correct",
    [
        ("math", "18", r"She makes \boxed{18} dollars.", "18", True),
        ("math", "18", "The answer is 18.", "18", True),
        ("math", "1,234", "it is 1234", "1234", True),
        ("math", r"\frac{1}{2}", r"thus $\boxed{0.5}$", "0.5", True),
        ("math", "1/2", r"\boxed{\frac12}", r"\frac12", True),
        ("math", r"2\sqrt{3}", r"\boxed{\sqrt{12}}", r"\sqrt{12}", True),
        ("math", "x+1", r"\boxed{1+x}", "1+x", True),
        ("math", r"\text{Evelyn}", r"\boxed{\text{Evelyn}}", r"\text{Evelyn}", True),
        ("math", "(1, 2)", r"\boxed{(2, 1)}", "(2, 1)", False),
        ("math", "18", r"\boxed{17}, not 18", "17", False),
        ("math", "42", "no idea", None, False),
        ("boxed", "42", "it is 42", None, False),
        ("boxed", r"\frac{1}{2}", r"\boxed{3} or \boxed{\frac{1}{2}} or \boxed{", r"\frac{1}{2}", True),
        ("number", "18", "first 17, then $18.00.", "18.00", True),
        ("number", "-3/4", "so -0.75", "-0.75", True),
        ("number", "1234567", "1,234,567 in all", "1,234,567", True),
        ("number", "5", "none", None, False),
        ("number", "15", "it takes 10-15", "15", True),
        ("number", "-15", "10 - -15.", "-15", True),
        ("math", "3,5", r"\boxed{35}", "35", False),
        ("math", "5", r"\boxed{1e1000000000}", "1e1000000000", False),
        ("boxed", "10", r"\boxed{1_0}", "1_0", False),
        (r"regex:#(\d\d)", "08", "#09 and #08", "08", True),
        (r"regex:#(\d\d)", "08", "#8", None, False),
        ("regex:yes|no", "no", "yes? no", "no", True),
        (r"regex:<answer>(.*?)</answer>", "a b", "<answer> a b</answer>", " a b", True),
    ],
)
def test_answers(name, right, text, answer, correct):
    assert checker(name).check(text, right) == (answer, correct)


def test_answers_by_what_is_none(monkeypatch):
    for name in ("maths", "regex", "regex:", "number:2"):
        with pytest.raises(ValueError, match="answer: expected math, boxed, number or regex:PATTERN"):
            checker(name)
    with pytest.raises(ValueError, match="no regular expression"):
        checker("regex:(")
    assert last_boxed(r"\boxed{a{b}c} \boxed{open") == "a{b}c" and last_boxed("none") is None
    monkeypatch.setitem(sys.modules, "math_verify", None)
    assert checker("number").check("4", "4")[1]
    with pytest.raises(MissingExtraError, match=r"needs math_verify: pip install lil-ops\[eval\]"):
        checker("math")


def test_stop_rules_by_name():
    assert stops.parse("off") is None
    assert stops.parse("guardian") == Guardian() == stops.parse("guardian:250:20")
    assert stops.parse("guardian:64:40:bits") == Guardian(64, 40, "bits")
    for name in ("off", "guardian:250:20", "guardian:64:2.5", "guardian:64:40:bits", "repetition:32:1:4", "tokens:500"):
        assert stops.canonical(name) == name
    for name in (
        "guardian:64:1234567",
        "loss:64:5:2",
        "guardian:64:5+answer",
        "repetition:32:1:4+rescue",
        "loss:9:1:1+rescue+answer",
    ):
        assert stops.canonical(name) == name
    assert stops.parse("loss:64:5:2") == Guardian(64, 5, loss_aware=True, loss_weight=2)
    assert stops.parse("guardian:64:5+answer") == Guardian(64, 5)
    answer = Answer((1, 2))
    assert [stops.action(f"guardian{end}", answer) for end in ("", "+answer", "+rescue", "+rescue+answer")] == [
        None, answer, Rescue(), Rescue(then=answer),
    ]  # fmt: skip
    assert [stops.answers(f"guardian{end}") for end in ("", "+answer", "+rescue", "+rescue+answer")] == [0, 1, 0, 1]
    assert stops.canonical("guardian") == "guardian:250:20" and stops.canonical("guardian:9:5.0") == "guardian:9:5"
    for name, message in [
        ("sometimes", "unknown stop rule 'sometimes': expected one of off, guardian"),
        ("guardian:64", "expected guardian:INTERVAL:THRESHOLD"),
        ("guardian+", "expected one of answer, rescue, rescue.answer behind a rule"),
        ("off+", "expected one of answer, rescue, rescue.answer behind a rule"),
        ("guardian:64:many", "expected numbers"),
        ("guardian:0:5", "interval: expected"),
        ("guardian:64:5:bytes", "unit: expected"),
        ("guardian:1:2:bits:4", "expected numbers"),
        ("off:1", "stop rule 'off:1'"),
        ("off+answer", "expected one of answer, rescue, rescue.answer behind a rule"),
        ("guardian+sleep", "expected one of answer, rescue, rescue.answer behind a rule"),
        ("loss:64", "expected loss:INTERVAL:THRESHOLD"),
        ("tokens", "expected numbers"),
        ("repetition:0", "max_pattern: expected"),
    ]:
        with pytest.raises(ValueError, match=message):
            stops.parse(name)


def test_a_grid_has_each_combination_once():
    combinations = grid.grid(["full", "quest", "sink:budget=32:sink=2"], ["64", "0.5"], ["off", "guardian"])
    assert [each.name for each in combinations] == [
        "full.off",
        "full.guardian-250-20",
        "quest-64.off",
        "quest-64.guardian-250-20",
        "quest-0.5.off",
        "quest-0.5.guardian-250-20",
        "sink-32-sink=2.off",
        "sink-32-sink=2.guardian-250-20",
    ]
    assert len(grid.grid(["full"], [], ["guardian", "guardian:250:20"])) == 1
    (only,) = grid.grid(["quest:scoring=meanstd:protect-prompt=true"], ["64"], ["off"])
    assert only.policy_options == {"scoring": "meanstd", "protect_prompt": True, "budget": 64}
    # The loss-aware rule's defaults are in the name.
    names = [each.name for each in grid.grid(["quest", "quest:scoring=minmax:sink=0"], ["64"], ["loss:64:5"])]
    assert names == ["quest-64-scoring=meanstd-sink=1.loss-64-5-1", "quest-64-scoring=minmax-sink=0.loss-64-5-1"]
    for policy, message in [
        ("qust", "did you mean 'quest'"),
        ("quest", "policy quest: budget: expected"),
        ("quest:64", "expected OPTION=VALUE"),
        ("quest:size=3", "unknown option 'size'"),
    ]:
        with pytest.raises(ValueError, match=message):
            grid.grid([policy], [], ["off"])


def test_a_problem_has_its_own_seed():
    assert seed_of(0, "1") == seed_of(0, "1") != seed_of(0, "2") != seed_of(1, "2")
    assert 0 <= seed_of(3, "naïve") < 2**32


def test_estimates():
    values = np.random.default_rng(1).normal(5, 2, 400)
    estimate = mean(values)
    assert estimate.value == pytest.approx(values.mean()) and estimate.n == 400
    # The textbook's interval, near enough.
    assert estimate.low == pytest.approx(values.mean() - 1.96 * values.std() / 20, abs=0.03)
    assert estimate.high == pytest.approx(values.mean() + 1.96 * values.std() / 20, abs=0.03)
    assert mean(values) == estimate
    assert ratio([2, 4], [1, 2])[:3] == (2, 2, 2) and ratio([1, 3], [2, 2]).value == 1
    assert math.isnan(mean([]).value) and mean([]).n == 0 and math.isnan(ratio([0], [0]).value)
    with pytest.raises(ValueError, match="as many values"):
        ratio([1], [1, 2])


def output(tokens: list[int], stop: str = "length", right: str = "7") -> Output:
    """Each token is a digit, and the answer is the last digit."""
    text, by = "".join(map(str, tokens)), checker(r"regex:\d")
    record = {"tokens": tokens, "text": text, "lengths": [1] * len(tokens), "stop": stop, "gold": right}
    record["answer"], record["correct"] = by.check(text, right)
    return Output(record, *_C.lz77_trace(np.array(tokens, dtype=np.int64), 10), by)


def test_a_replay_stops_where_the_rule_would():
    loop, fresh, ended = [3] * 40, [0, 1, 2, 3, 4, 5, 6, 7, 8, 9] * 2, [3] * 16
    outputs = [output(loop), output(fresh), output(ended, "eos"), output(ended), output([3] * 5)]
    # A loop has 2 phrases for good. The digits have 8 at 8 tokens and 11 at 16.
    for rule, tokens, fired in [
        # The third has ended by itself where the rule would fire; the fourth is as long as it was allowed to be.
        (Guardian(8, 2), [16, 20, 16, 16, 5], [1, 0, 0, 1, 0]),
        (Guardian(8, 0), [40, 20, 16, 16, 5], [0, 0, 0, 0, 0]),
        (Guardian(8, 4), [8, 16, 8, 8, 5], [1, 1, 1, 1, 0]),
        # Rules of other kinds see the tokens too.
        (stops.parse("repetition:4:1:3"), [3, 20, 3, 3, 3], [1, 0, 1, 1, 1]),
        (stops.parse("tokens:16"), [16, 16, 16, 16, 5], [1, 1, 0, 1, 0]),
    ]:
        assert stops_at(rule, outputs) == list(zip(tokens, fired, strict=True))
    assert stops_at(Guardian(8, 1), []) == []
    with pytest.raises(ValueError, match="needs the information loss"):
        stops_at(Guardian(8, 1, loss_aware=True), outputs)


def test_the_effect_of_a_replay_counts_answers_given_before_the_stop():
    runs = [{"a": output([3] * 15 + [7]), "b": output([7] * 16), "c": output([7] * 4)}]
    at = replay(Guardian(8, 3), runs)
    assert at == [{"a": (8, True), "b": (8, True), "c": (4, False)}]
    found = effect(runs, at)
    assert found.saved.value == 16 / 36 and found.stopped.value == 2 / 3 and found.saved.n == 3
    assert (found.before.value, found.after.value, found.lost) == (1, 2 / 3, 1)
    assert found.difference.value == pytest.approx(-1 / 3)
    # Two runs together: by problem, on those that both have.
    both = effect([*runs, {"b": output([7] * 16)}], [*at, {"b": Stop(8, True)}])
    assert both.saved == (0.5, 0.5, 0.5, 1) and both.lost == 0


def test_a_document_in_both_forms(tmp_path):
    document = Document("Title <1>", [Heading(2, "A & B"), Paragraph("text"), Table(["x", "y|z"], [["1", "<2>"]])])
    assert "| x | y\\|z |\n| --- | ---: |\n| 1 | <2> |" in document.markdown()
    page = document.html(tmp_path)
    assert "<title>Title &lt;1&gt;</title>" in page and "<td>&lt;2&gt;</td>" in page and "<h2>A &amp; B</h2>" in page


def test_environments_are_told_once_whatever_their_date():
    environments = [{"torch": "1", "date": "a"}, {"torch": "1", "date": "b"}, {"torch": "2", "date": "b"}]
    assert summary._distinct(environments) == [environments[0], environments[2]]

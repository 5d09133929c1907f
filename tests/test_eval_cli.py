"""lil-ops eval, replay and report: what is recorded, what survives a kill, and how each mistake ends."""

import errno
import json
import lzma
import os
import re
import signal
import subprocess
import sys
import time

import pytest
import torch
import transformers as hf
from test_cli import LIL_OPS, assert_user_error, byte_tokenizer
from tiny_models import BASE

import lil_ops
from lil_ops.cli import main, session
from lil_ops.decode import DecodeLoop
from lil_ops.evaluation import records
from lil_ops.evaluation.records import RECORD, read
from lil_ops.evaluation.runner import seed_of

TOKENS = 40
OPTIONS = ["--max-new-tokens", TOKENS, "--temperature", 0.4, "--answer", "number", "--threads", 1]
# Of a random model's outputs this ends some and not others.
GUARDIAN = "guardian:10:8"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A random Llama of one byte a token, and five problems beside it."""
    path = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    hf.LlamaForCausalLM(hf.LlamaConfig(**{**BASE, "vocab_size": 257})).save_pretrained(path)
    byte_tokenizer().save_pretrained(path)
    problems = [{"question": "What is " + "+".join("123456"[: i + 2]) + "?", "answer": f"#### {i}"} for i in range(5)]
    (path / "problems.jsonl").write_text("".join(json.dumps(problem) + "\n" for problem in problems))
    return path


@pytest.fixture
def lil(capsys, monkeypatch):
    """Call `main`: (exit code, stdout, stderr)."""
    monkeypatch.setenv("COLUMNS", "100")
    threads = torch.get_num_threads()

    def call(*arguments):
        capsys.readouterr()
        with pytest.raises(SystemExit) as exit:
            main([str(argument) for argument in arguments])
        return (exit.value.code or 0, *capsys.readouterr())

    yield call
    torch.set_num_threads(threads)


@pytest.fixture
def evaluate(lil, folder, tmp_path):
    def call(*arguments, out=tmp_path / "runs"):
        data = ("--data", folder / "problems.jsonl")
        return lil("eval", "--model", folder, *data, "--out", out, *OPTIONS, "--batch", 2, *arguments)

    return call


@pytest.fixture(scope="module")
def recorded(folder, tmp_path_factory):
    """Dense and Sink, with and without Guardian. Tests read it, and copy what they change."""
    out = tmp_path_factory.mktemp("recorded")
    grid = ["--policy", "full,sink", "--budget", "16", "--stop", f"off,{GUARDIAN}"]
    data = ["--data", folder / "problems.jsonl", "--out", out, "--batch", 2]
    threads = torch.get_num_threads()
    with pytest.raises(SystemExit) as exit:
        main([str(argument) for argument in ["eval", "--model", folder, *data, *OPTIONS, *grid]])
    torch.set_num_threads(threads)
    assert not exit.value.code
    return out


def outcome(run: records.Run) -> dict:
    """What of a run must not depend on how it came about: all but times."""
    return {
        id: {key: value for key, value in record.items() if not key.endswith("_s")}
        for id, record in run.records.items()
    }


def test_the_engine_gives_the_records_of_the_loop(recorded, evaluate, tmp_path):
    grid = ["--policy", "full,sink", "--budget", "16", "--stop", f"off,{GUARDIAN}"]
    code, _, err = evaluate("--engine", *grid)
    assert code == 0 and not err
    loops, engines = (sorted(path.glob("*.jsonl")) for path in (recorded, tmp_path / "runs"))
    assert [path.name for path in loops] == [path.name for path in engines] and len(loops) == 4
    for loop, engine in zip(map(read, loops), map(read, engines), strict=True):
        assert loop.shared != engine.shared
        # In the engine a sequence has the pages of its whole length from the start.
        for of_loop, of_engine in zip(outcome(loop).values(), outcome(engine).values(), strict=True):
            assert of_engine.pop("kv_bytes") >= of_loop.pop("kv_bytes")
            assert of_loop == of_engine
        assert all(0 < r["ttft_s"] <= r["jct_s"] for r in engine.records.values())


def test_the_engine_at_a_limit_of_one_token(evaluate, tmp_path):
    """The first prompt is the longest of its batch: nothing that goes before it may need more room."""
    code, _, err = evaluate("--engine", "--max-new-tokens", 1, "--batch", 1)
    assert code == 0 and not err
    assert [len(each["tokens"]) for each in read(tmp_path / "runs" / "full.off.jsonl").records.values()] == [1] * 5


def test_the_engine_leaves_out_what_it_cannot_serve(evaluate):
    code, _, err = evaluate("--engine", "--policy", "rkv", "--budget", "64")
    assert code == 2 and "policy rkv decides on the host" in err


def test_every_record_is_what_generate_gives(recorded, folder):
    assert sorted(path.name for path in recorded.iterdir()) == [
        "full.guardian-10-8.jsonl",
        "full.off.jsonl",
        "sink-16.guardian-10-8.jsonl",
        "sink-16.off.jsonl",
    ]
    run = read(recorded / "sink-16.guardian-10-8.jsonl")
    assert run.damaged == [] and list(run.records) == list("01234") and len(run.environments) == 1
    assert run.environments[0]["torch"] == torch.__version__
    assert (run.settings["policy_options"], run.settings["vocab_size"]) == ({"budget": 16}, 257)
    model, tokenizer = lil_ops.load_model(folder)
    questions = [json.loads(line) for line in (folder / "problems.jsonl").read_text().splitlines()]
    for id, record in run.records.items():
        prompt = tokenizer("<user>" + questions[int(id)]["question"]).input_ids
        options = {"temperature": 0.4, "max_new_tokens": TOKENS, "guardian": lil_ops.Guardian(10, 8)}
        result = lil_ops.generate(model, [prompt], policy="sink", budget=16, seed=[seed_of(0, id)], **options)
        assert set(record) == set(RECORD)
        assert record["tokens"] == result.tokens[0]
        assert record["text"] == tokenizer.decode(record["tokens"], skip_special_tokens=True)
        assert (record["stop"], record["phrases"]) == (result.stop_reason[0].name.lower(), result.phrases[0])
        assert record["kv_bytes"] == result.kv_bytes[0] == result.kv_bytes_peak
        assert (record["prompt_tokens"], record["gold"]) == (len(prompt), id)
        assert sum(record["lengths"]) == len(record["text"]) and len(record["lengths"]) == len(record["tokens"])
        assert record["jct_s"] == pytest.approx(record["ttft_s"] + record["tbt_s"] * (len(record["tokens"]) - 1))
        assert run.curve(id).tolist() == result.lz77[0].tolist()
    assert {record["stop"] for record in run.records.values()} == {"guardian", "length"}


def test_what_a_stop_rule_brings_about(evaluate, tmp_path):
    quest = ["--policy", "quest:dense_layers=0:scoring=meanstd:sink=0", "--budget", 16, "--limit", 2]
    stops = ["--stop", "guardian:10:99+answer,loss:10:99+rescue", "--answer-text", "So:", "--answer-tokens", 3]
    assert evaluate(*quest, *stops)[0] == 0
    name = "quest-16-dense_layers=0-scoring=meanstd-sink=0"
    for record in read(tmp_path / "runs" / f"{name}.guardian-10-99+answer.jsonl").records.values():
        assert record["events"] == [[10, "answer"]] and len(record["tokens"]) == 16 and "So:" in record["text"]
        assert record["lost_bits"] is None
    for record in read(tmp_path / "runs" / f"{name}.loss-10-99-1+rescue.jsonl").records.values():
        assert record["events"] == [[10, "rescue"]] and len(record["tokens"]) == 20
        assert record["lost_bits"] > 0
    assert_user_error_at_last(evaluate("--stop", "guardian+answer", "--limit", 1), "Answer: text: the chat template")


@pytest.mark.parametrize("engine", [(), ["--engine"]])
def test_losses_are_measured_where_the_policy_tells(engine, evaluate, tmp_path):
    policies = ["--policy", "full,sink,quest:dense_layers=0", "--budget", 32, "--limit", 2, *engine]
    assert evaluate(*policies, "--measure-loss")[0] == 0
    lost = {
        name: [record["lost_bits"] for record in read(tmp_path / "runs" / f"{name}.off.jsonl").records.values()]
        for name in ("full", "sink-32", "quest-32-dense_layers=0")
    }
    assert lost["full"] == [0, 0] and lost["sink-32"] == [None, None]
    assert all(bits > 0 for bits in lost["quest-32-dense_layers=0"])
    assert_user_error_at_last(evaluate(*policies), "measure_loss")


def test_the_same_command_again_runs_nothing(evaluate, monkeypatch, tmp_path):
    code, out, err = evaluate("--stop", f"off,{GUARDIAN}")
    assert (code, err) == (0, "") and "5 problems" in out and "dense, guardian:10:8" in out
    before = {path.name: read(path).records for path in (tmp_path / "runs").iterdir()}
    monkeypatch.setattr(DecodeLoop, "prefill", lambda loop: pytest.fail("it ran"))
    assert evaluate("--stop", f"off,{GUARDIAN}")[0] == 0
    assert before == {path.name: read(path).records for path in (tmp_path / "runs").iterdir()}


def test_results_do_not_depend_on_the_batch(evaluate, recorded, tmp_path):
    evaluate("--batch", 5, "--policy", "sink", "--budget", 16)
    evaluate("--batch", 1, "--policy", "sink", "--budget", 16, out=tmp_path / "one")
    expected = outcome(read(recorded / "sink-16.off.jsonl"))
    for path in (tmp_path / "runs", tmp_path / "one"):
        assert outcome(read(path / "sink-16.off.jsonl")) == expected


def test_a_killed_process_goes_on_where_it_was(folder, recorded, evaluate, tmp_path):
    arguments = ["eval", "--model", folder, "--data", folder / "problems.jsonl", "--out", tmp_path / "runs", *OPTIONS]
    process = subprocess.Popen([*LIL_OPS, *map(str, arguments), "--batch", "2"], stdout=subprocess.DEVNULL)
    path = tmp_path / "runs" / "full.off.jsonl"
    while not (path.exists() and path.read_bytes().count(b"\n") >= 4):
        assert process.poll() is None
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()
    before = read(path)
    assert 2 <= len(before.records) < 5 and before.damaged == []
    assert evaluate()[0] == 0
    after = read(path)
    assert {id: after.records[id] for id in before.records} == before.records
    assert len(path.read_bytes().splitlines()) == 1 + 2 + 5 and len(after.environments) == 2
    assert outcome(after) == outcome(read(recorded / "full.off.jsonl"))


def test_ctrl_c_keeps_whole_batches(evaluate, monkeypatch, tmp_path):
    calls, step = [], DecodeLoop.step

    def interrupted(loop):
        calls.append(loop)
        if len(calls) == 1 + 3 + TOKENS:
            signal.raise_signal(signal.SIGINT)
        return step(loop)

    monkeypatch.setattr(DecodeLoop, "step", interrupted)
    code, _, err = evaluate()
    assert code == 130 and "the same command goes on from here" in err
    assert list(read(tmp_path / "runs" / "full.off.jsonl").records) == ["0", "1"]


def test_damaged_lines_are_told_and_run_again(evaluate, recorded, tmp_path):
    whole = (recorded / "full.off.jsonl").read_text().splitlines()
    other = {**json.loads(whole[3]), "tokens": [999]}
    fourth = json.loads(whole[4])
    damaged = [
        *whole[:2],
        "no json",
        whole[3],
        json.dumps(other),
        json.dumps(fourth | {"lengths": ["1"] * len(fourth["lengths"])}),
        json.dumps(fourth | {"jct_s": float("nan")}),
        json.dumps(fourth | {"text": fourth["text"] + "more"}),
        whole[4],
        whole[4][:50] + "\x00",
        "[]",
        whole[6][:99],
    ]
    path = tmp_path / "runs" / "full.off.jsonl"
    path.parent.mkdir()
    path.write_text("\n".join(damaged))
    code, out, err = evaluate()
    assert code == 0 and "5 problems" in out
    told = re.findall(r"line (\d+): (.*): skipped; what is missing runs again", err)
    assert told == [
        ("3", "not JSON, cut or damaged"),
        ("5", "expected as many lengths as tokens"),
        ("6", "expected lengths that add up to the text's"),
        ("7", "expected finite times"),
        ("8", "expected lengths that add up to the text's"),
        ("10", "not JSON, cut or damaged"),
        ("11", "not an object"),
        ("12", "not JSON, cut or damaged"),
    ]
    assert outcome(read(path)) == {id: outcome(read(recorded / "full.off.jsonl"))[id] for id in read(path).records}
    assert sorted(read(path).records) == list("01234")


def test_a_first_line_that_was_cut_is_written_anew(evaluate, tmp_path):
    path = tmp_path / "runs" / "full.off.jsonl"
    path.parent.mkdir()
    path.write_text('{"settings": {"mod')
    assert evaluate("--limit", 1)[0] == 0 and len(read(path).records) == 1


def test_other_settings_are_refused(evaluate, folder, tmp_path):
    assert evaluate("--limit", 2)[0] == 0
    content = (tmp_path / "runs" / "full.off.jsonl").read_bytes()
    for options, message in [
        (["--limit", 2, "--seed", 1], "begun with other settings .seed: 0, now 1.; take those, or another folder"),
        ([], "problems: 2, now 5; problems_sha256"),
        (["--limit", 2, "--batch", 1], "batch: 2, now 1"),
        (["--limit", 2, "--template", "{question}!"], "template: '{question}', now '{question}!'"),
    ]:
        assert_user_error_at_last(evaluate(*options), message)
    assert (tmp_path / "runs" / "full.off.jsonl").read_bytes() == content


def assert_user_error_at_last(outcome: tuple[int, str, str], message: str) -> None:
    assert outcome[0] == 2 and re.match(f"lil-ops: error: .*{message}", outcome[2]), outcome


def test_files_that_are_no_run_or_in_use(evaluate, recorded, tmp_path):
    path = tmp_path / "runs" / "full.off.jsonl"
    path.parent.mkdir()
    for mine in ('{"question": "mine"}\n', "mine"):
        path.write_text(mine)
        assert_user_error_at_last(evaluate(), "full.off.jsonl, line 1: expected the settings of a run")
        assert path.read_text() == mine
    path.unlink()
    settings = read(recorded / "full.off.jsonl").settings
    with records.Writer(path, settings, {}):
        assert_user_error_at_last(evaluate(), "another process is writing this run")


def test_places_that_cannot_be_written(evaluate, recorded, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    assert_user_error(evaluate(out=tmp_path / "file"), ".*File exists")
    assert_user_error(evaluate(out=tmp_path / "file" / "below"), ".*Not a directory")
    (tmp_path / "runs" / "full.off.jsonl").mkdir(parents=True)
    assert_user_error_at_last(evaluate(), "cannot write .*full.off.jsonl: Is a directory")

    def full(*arguments):
        raise OSError(errno.ENOSPC, "No space left on device")

    with records.Writer(tmp_path / "x.jsonl", read(recorded / "full.off.jsonl").settings, {}) as writer:
        monkeypatch.setattr(os, "fsync", full)
        with pytest.raises(ValueError, match=r"cannot write .*No space left"):
            writer.append([{"id": "0"}])


EARLY_ERRORS = {
    "data": (["--data", "none.jsonl"], "cannot read the problems: none.jsonl: No such file"),
    "field": (["--question-field", "text"], "expected the question as text or number in field 'text', got the fields"),
    "policy": (["--policy", "qust"], "unknown policy 'qust'.*did you mean 'quest'"),
    "no budget": (["--policy", "full,quest"], "policy quest: budget"),
    "budget": (["--policy", "sink", "--budget", "4"], "policy sink: budget: expected at least"),
    "budgets": (["--policy", "sink", "--budget", "64,,32"], "--budget: expected words with commas"),
    "stop": (["--stop", "never"], "unknown stop rule 'never'"),
    "answer": (["--answer", "guess"], "answer: expected math"),
    "template": (["--template", "none"], "--template: expected {question}"),
    "temperature": (["--temperature", "-1"], "temperature: expected"),
    "device": (["--device", "tpu"], "device: expected cpu"),
    "batch": (["--batch", "0"], "Invalid value for '--batch'"),
}


@pytest.mark.parametrize("case", EARLY_ERRORS)
def test_an_error_before_the_model_is_loaded(evaluate, monkeypatch, case):
    monkeypatch.setattr(session, "load", lambda *arguments: pytest.fail("the model was loaded"))
    options, message = EARLY_ERRORS[case]
    assert_user_error(evaluate(*options), message)


def test_a_budget_that_is_too_small_for_a_prompt_is_left_out(evaluate, tmp_path):
    options = ["--policy", "raas", "--budget", "16,96", "--limit", 1]
    code, _, err = evaluate(*options)
    assert code == 0 and re.match("left out: raas-16.off: policy raas: budget: expected at least .* a prompt of", err)
    assert [path.name for path in (tmp_path / "runs").iterdir()] == ["raas-96.off.jsonl"]
    assert_user_error_at_last(evaluate("--policy", "raas", "--budget", 16), "policy raas: budget: expected")
    # A share is of what a sequence may become, which is known with the prompts.
    assert evaluate("--policy", "sink", "--budget", 0.5, "--limit", 1)[0] == 0
    # Of a batch with its longest prompt: 20, 24 and 26 tokens, and 40 more.
    code, _, err = evaluate("--policy", "full,quest", "--budget", 0.26, out=tmp_path / "shares")
    assert code == 0 and re.match("left out: quest-0.26.off: policy quest: budget: expected at least 16", err)
    assert_user_error_at_last(evaluate("--max-new-tokens", 10**13, out=tmp_path / "long"), "no memory for 1 problems")


def test_a_share_of_few_tokens_is_enough_where_outputs_are_long(evaluate):
    """The warm-up, of two tokens, must not be the length that it is a share of."""
    assert evaluate("--policy", "quest", "--budget", 0.5, "--limit", 1)[0] == 0


def test_a_full_disk(recorded, tmp_path):
    code = (
        "import resource, sys; from lil_ops.evaluation.records import *; "
        "resource.setrlimit(resource.RLIMIT_FSIZE, (2500, 2500)); import signal; "
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "with Writer(Path(sys.argv[2]), read(Path(sys.argv[1])).settings, {}) as writer:\n"
        "    writer.append([{'id': 'x' * 9000}])"
    )
    run = subprocess.run(
        [sys.executable, "-c", code, recorded / "full.off.jsonl", tmp_path / "x.jsonl"], capture_output=True, text=True
    )
    assert "ValueError: cannot write" in run.stderr.splitlines()[-1] and "File too large" in run.stderr


def test_a_finished_run_kept_as_xz_is_not_run_again(recorded, evaluate, monkeypatch, tmp_path):
    (tmp_path / "runs").mkdir()
    source, kept = recorded / "full.off.jsonl", tmp_path / "runs" / "full.off.jsonl.xz"
    kept.write_bytes(lzma.compress(source.read_bytes()))
    assert_user_error_at_last(evaluate("--seed", 5), ".*begun with other settings")
    with monkeypatch.context() as patch:
        patch.setattr(DecodeLoop, "__iter__", lambda loop: pytest.fail("a problem was run"))
        assert evaluate()[0] == 0
    assert [path.name for path in (tmp_path / "runs").iterdir()] == [kept.name]
    (tmp_path / "runs" / "full.off.jsonl").write_bytes(source.read_bytes())
    assert_user_error_at_last(evaluate(), ".*kept both as it is and as full.off.jsonl.xz")
    (tmp_path / "runs" / "full.off.jsonl").unlink()
    kept.write_bytes(lzma.compress(b"".join(source.read_bytes().splitlines(keepends=True)[:3])))
    assert_user_error_at_last(evaluate(), ".*has 1 of 5 problems; unpack it to go on")


def test_a_missing_library_is_named(evaluate, lil, recorded, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "math_verify", None)
    assert_user_error(evaluate("--answer", "math"), re.escape("this needs math_verify: pip install lil-ops[eval]"))
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert_user_error(lil("report", recorded, "--out", tmp_path), re.escape("this needs matplotlib: pip install"))


def test_replay_is_the_real_run_token_for_token(recorded, lil):
    from lil_ops.evaluation.replay import outputs, replay
    from lil_ops.evaluation.stops import parse

    code, out, _ = lil("replay", recorded, "--interval", 10, "--threshold", "8,30", "--json")
    documents = {document["policy"]: document for document in json.loads(out)}
    assert code == 0 and list(documents) == ["dense", "sink 16"]
    for policy, name in (("dense", "full"), ("sink 16", "sink-16")):
        free, real = (read(recorded / f"{name}.{stop}.jsonl") for stop in ("off", "guardian-10-8"))
        texts = outputs(free)
        (at,) = replay(parse(GUARDIAN), [texts])
        for id, record in real.records.items():
            assert free.records[id]["tokens"][: at[id].tokens] == record["tokens"]
            assert texts[id].correct_at(at[id].tokens) == record["correct"]
            assert at[id].fired == (record["stop"] == "guardian")
        found = documents[policy]["replays"][0]
        before, after = (sum(len(record["tokens"]) for record in run.records.values()) for run in (free, real))
        assert 0 < after < before and found["saved"]["value"] == pytest.approx(1 - after / before)
        assert found["after"]["value"] == sum(record["correct"] for record in real.records.values()) / 5
        assert (found["saved"]["n"], found["interval"], found["unit"]) == (5, 10, "phrases")
        assert documents[policy]["replays"][1]["saved"]["value"] == 1 - 10 / TOKENS


def test_compressed_runs_are_read_as_the_others(recorded, lil, tmp_path):
    for path in recorded.glob("*.off.jsonl"):
        (tmp_path / f"{path.name}.xz").write_bytes(lzma.compress(path.read_bytes()))
    rule = "--interval", 10, "--threshold", 8, "--json"
    plain, packed = (json.loads(lil("replay", folder, *rule)[1]) for folder in (recorded, tmp_path))
    assert [document | {"run": ""} for document in packed] == [document | {"run": ""} for document in plain]
    (tmp_path / "cut.jsonl.xz").write_bytes(b"no xz")
    assert_user_error(lil("replay", tmp_path / "cut.jsonl.xz"), "cannot read .*cut.jsonl.xz: ")


def test_replay_as_a_table_with_texts_judged_anew(recorded, lil):
    one_rule = [recorded / "full.off.jsonl", "--interval", "10", "--threshold", "8"]
    code, out, err = lil("replay", *one_rule, "--answer", "regex:x")
    assert (code, err) == (0, "") and re.search(r"dense: 5 problems, right answers 0 %[^$]*\n +10 +8 +\d+% ", out)
    assert max(map(len, out.splitlines())) <= 100
    for arguments, message in [
        ([recorded / "full.guardian-10-8.jsonl"], "no run without a stop rule"),
        ([recorded / "none.jsonl"], "cannot read .*none.jsonl: No such file"),
        ([recorded, "--interval", "x"], "--interval: expected whole numbers"),
        ([recorded, "--threshold", "x"], "--threshold: expected numbers"),
        ([recorded, "--interval", "0"], "Guardian: interval: expected"),
        ([recorded, "--answer", "guess"], "answer: expected math"),
        ([recorded, "--unit", "bytes"], "Guardian: unit: expected"),
    ]:
        assert_user_error(lil("replay", *arguments), message)


FIGURES = ["jct", "factors", "length_inflation", "against_budget", "growth", "sensitivity"]


def test_a_report_has_every_part(recorded, lil, tmp_path):
    options = ["--interval", "10,20", "--threshold", "4,8"]
    code, out, err = lil("report", recorded, "--out", tmp_path / "report", *options)
    assert (code, err) == (0, "")
    pictures = [f"{name}.{kind}" for name in FIGURES for kind in ("png", "svg")]
    names = ["report.md", "report.html", "report.json", *pictures]
    assert [os.path.basename(line) for line in out.splitlines()] == names
    assert sorted(names) == sorted(path.name for path in (tmp_path / "report").iterdir())

    text = (tmp_path / "report" / "report.md").read_text()
    assert re.findall(r"\]\((\w+)\.png\)", text) == FIGURES
    assert re.findall("Left out: .*", text) == ["Left out: no run has measured it (`lil-ops eval --measure-loss`)."]
    assert "nan" not in text
    page = (tmp_path / "report" / "report.html").read_text()
    assert page.count("data:image/svg+xml;base64,") == 6 and not re.search(r'(src|href)="(?!data:)', page)

    def no_constant(name):
        raise AssertionError(name)

    (numbers,) = json.loads((tmp_path / "report" / "report.json").read_text(), parse_constant=no_constant)
    runs = {run["name"]: run for run in numbers["runs"]}
    off, guarded = (read(recorded / f"sink-16.{stop}.jsonl").records for stop in ("off", "guardian-10-8"))
    dense = read(recorded / "full.off.jsonl").records
    lengths = [sum(len(record["tokens"]) for record in run.values()) for run in (dense, off, guarded)]
    assert runs["sink 16, guardian:10:8"]["against_off"]["all"]["saved"]["value"] == pytest.approx(
        1 - lengths[2] / lengths[1]
    )
    assert runs["sink 16"]["against_dense"]["length_ratio"]["value"] == lengths[1] / lengths[0] == 1
    assert runs["dense"]["against_dense"] is None and runs["dense"]["tokens"]["n"] == 5
    for run in runs.values():
        decode = (run["tokens"]["value"] - 1) * run["tbt_s"]["value"]
        assert run["jct_s"]["value"] == pytest.approx(run["ttft_s"]["value"] + decode)
    replayed = {(row["runs"], row["interval"], row["threshold"]): row for row in numbers["sensitivity"]}
    assert replayed["sink 16", 10, 8]["saved"] == runs["sink 16, guardian:10:8"]["against_off"]["all"]["saved"]


def test_a_report_says_what_it_has_no_data_for(recorded, lil, tmp_path):
    lil("report", recorded / "sink-16.guardian-10-8.jsonl", "--out", tmp_path)
    text = (tmp_path / "report.md").read_text()
    assert text.count("Left out: there is no dense run") == 2
    assert "Left out: there is no run of a sparse policy without a stop rule." in text
    assert "Left out: there is no run without a stop rule, which a replay needs." in text
    assert "Left out: no policy has a run with a stop rule beside one without" in text
    assert re.findall(r"\]\((\w+)\.png\)", text) == ["jct"]


def test_a_report_without_times(recorded, lil, tmp_path):
    assert lil("report", recorded, "--no-times", "--out", tmp_path)[0] == 0
    text = (tmp_path / "report.md").read_text()
    assert re.findall(r"\]\((\w+)\.png\)", text) == FIGURES[2:]
    assert "Times are left out" in text and not re.search("JCT|TTFT|TBT", text)


def test_a_report_of_runs_without_a_common_problem(recorded, lil, tmp_path):
    """And of an environment that a damaged line tells half of."""
    lines = (recorded / "sink-16.off.jsonl").read_text().splitlines(keepends=True)
    half = '{"environment": {"torch": "x"}}\n'
    other = json.dumps(json.loads(lines[0])["settings"] | {"policy_options": {"budget": 24}})
    (tmp_path / "a.jsonl").write_text(lines[0] + half + lines[2])
    (tmp_path / "b.jsonl").write_text(f'{{"settings": {other}}}\n' + lines[3])
    code, _, err = lil("report", tmp_path / "a.jsonl", tmp_path / "b.jsonl", "--out", tmp_path / "out")
    assert (code, err) == (0, "")
    assert "Ran on unknown, unknown threads" in (tmp_path / "out" / "report.md").read_text()


def test_a_report_of_runs_that_cannot_be_compared(recorded, lil, evaluate, tmp_path):
    assert evaluate("--limit", 1, "--seed", 5)[0] == 0
    path = tmp_path / "runs" / "full.off.jsonl"
    lines = (recorded / "full.off.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "cut.jsonl").write_text("".join(lines[:4]))
    options = ["--interval", "10", "--threshold", "8", "--out", tmp_path / "out"]
    code, out, _ = lil("report", path, tmp_path / "cut.jsonl", *options)
    assert code == 0 and {"1_jct.png", "2_jct.svg"} <= {os.path.basename(line) for line in out.splitlines()}
    text = (tmp_path / "out" / "report.md").read_text()
    assert text.count("\n## ") == 2 and "Not finished: dense has 2 of 5 problems." in text
    message = "full.off.jsonl and .*cut.jsonl: the same run twice"
    assert_user_error(lil("report", recorded, tmp_path / "cut.jsonl", "--out", tmp_path), ".*" + message)
    assert_user_error(lil("report", tmp_path / "out", "--out", tmp_path), ".*no .jsonl files in this folder")
    assert_user_error(lil("report", recorded, "--out", path), ".*File exists")
    assert_user_error(lil("report", recorded), "Missing option '--out'")


def test_help(lil):
    out = lil("--help")[1]
    assert all(re.search(rf"\b{name}\b", out) for name in ("eval", "replay", "report"))
    some = {"eval": ["--policy", "--stop", "--answer"], "replay": ["--interval"], "report": ["--out"]}
    for name, options in some.items():
        code, out, _ = lil(name, "--help")
        assert code == 0 and all(option in out for option in options)

"""lil-ops: what a user sees, what a program reads, and how each mistake and Ctrl-C ends."""

import io
import json
import os
import pty
import re
import shutil
import signal
import subprocess
import sys

import pytest
import torch
import transformers as hf
from rich.console import Console
from tiny_models import BASE
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

import lil_ops
from lil_ops.cli import display, main, session
from lil_ops.cli.display import RunView, seconds, size
from lil_ops.decode import DecodeLoop
from lil_ops.result import StepEvent
from lil_ops.stopping import StopReason
from lil_ops.text import Detokenizer

PROMPT = "Ten pens, six books: what is the change?"
QUEST = ["--policy", "quest", "--budget", "32"]
GUARDIAN = ["--guardian", "--interval", "8", "--threshold", "1000"]
NAMES = ["dense", "dense + Guardian", "quest", "quest + Guardian"]
LIL_OPS = [sys.executable, "-c", "from lil_ops.cli import main; main()"]


def byte_tokenizer() -> hf.PreTrainedTokenizerFast:
    """One token a byte, so that most characters beyond ASCII take several; a chat template that shows."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({character: i for i, character in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    wrapped = hf.PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>")
    wrapped.chat_template = "<{{ messages[0].role }}>{{ messages[0].content }}"
    return wrapped


@pytest.fixture(scope="module")
def tokenizer():
    return byte_tokenizer()


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tokenizer):
    """A random Llama of one byte a token, saved as a user's model would be."""
    path = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    hf.LlamaForCausalLM(hf.LlamaConfig(**{**BASE, "vocab_size": 257})).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


@pytest.fixture
def lil(capsys, monkeypatch):
    """Call `main`: (exit code, stdout, stderr)."""
    monkeypatch.setenv("COLUMNS", "100")

    def call(*arguments):
        # What the test itself has caused is not lil-ops' output.
        capsys.readouterr()
        with pytest.raises(SystemExit) as exit:
            main([str(argument) for argument in arguments])
        return (exit.value.code or 0, *capsys.readouterr())

    return call


@pytest.fixture
def generate(lil, folder):
    return lambda *arguments: lil("generate", "--model", folder, "--max-new-tokens", 24, *arguments)


def table_rows(text: str) -> dict[str, list[str]]:
    """Cells of the table's rows by run name; columns are two or more spaces apart."""
    cells = [re.split(r"\s{2,}", line.strip()) for line in text.splitlines()]
    return {row[0]: row[1:] for row in cells if row[0] in NAMES}


def test_the_text_is_streamed_and_the_table_has_a_row_a_run(generate, folder, tokenizer):
    code, out, err = generate(*QUEST, *GUARDIAN, PROMPT)
    assert (code, err) == (0, "")
    rows = table_rows(out)
    assert list(rows) == NAMES
    assert [(row[0], row[1]) for row in rows.values()] == [("24", "length"), ("8", "guardian")] * 2
    assert rows["dense"][5] == "1.00x" and all(re.fullmatch(r"\d+\.\d\dx", row[5]) for row in rows.values())
    assert max(map(len, out.split("run  ")[1].splitlines())) <= 100

    model, _ = lil_ops.load_model(folder)
    prompt = tokenizer("<user>" + PROMPT).input_ids
    expected = lil_ops.generate(model, [prompt], policy="quest", budget=32, max_new_tokens=8).tokens[0]
    assert out.startswith(tokenizer.decode(expected, skip_special_tokens=True) + "\n")


@pytest.mark.parametrize(
    "options, names",
    [
        ([], ["dense"]),
        (QUEST, ["dense", "quest"]),
        (GUARDIAN, ["dense", "dense + Guardian"]),
        ([*QUEST, *GUARDIAN, "--no-compare"], ["quest + Guardian"]),
    ],
)
def test_no_row_twice_and_each_row_a_run_of_its_own(generate, monkeypatch, options, names):
    prefills = []
    prefill = DecodeLoop.prefill
    monkeypatch.setattr(DecodeLoop, "prefill", lambda loop: prefills.append(loop) or prefill(loop))
    code, out, _ = generate(*options, PROMPT)
    assert code == 0 and list(table_rows(out)) == names
    # One more: the warm-up.
    assert len(prefills) == len(names) + 1
    assert ("JCT/dense" in out) == (len(names) > 1)


def test_json_is_one_document_with_every_run(generate, folder, tokenizer):
    code, out, err = generate(*QUEST, *GUARDIAN, "--no-chat", "--seed", 3, "--temperature", 0.7, "--json", PROMPT)
    assert (code, err) == (0, "")
    document = json.loads(out)
    assert list(document) == ["prompt", "prompt_ids", "model", "options", "versions", "interrupted", "runs"]
    assert document["prompt"] == PROMPT and document["prompt_ids"] == tokenizer(PROMPT).input_ids
    assert document["model"] == str(folder) and document["versions"] == lil_ops.build_info()
    options = document["options"]
    assert (options["policy"], options["budget"], options["sink"]) == ("quest", 32, None)
    assert (options["dtype"], options["seed"], options["chat"]) == ("float32", 3, False)
    assert document["interrupted"] is False
    assert [run["name"] for run in document["runs"]] == NAMES

    model, _ = lil_ops.load_model(folder)
    for run in document["runs"]:
        result = lil_ops.generate(
            model,
            [document["prompt_ids"]],
            policy=run["policy"],
            guardian=lil_ops.Guardian(**run["guardian"]) if run["guardian"] else None,
            max_new_tokens=24,
            temperature=0.7,
            seed=3,
            **run["policy_options"],
        )
        assert run["tokens"] == result.tokens[0] and run["text"] == tokenizer.decode(run["tokens"])
        assert run["stop_reason"] == ("guardian" if "Guardian" in run["name"] else "length")
        assert run["lz77_curve"] == result.lz77[0].tolist() and run["phrases"] == run["lz77_curve"][-1]
        assert run["ratio"] == run["phrases"] / len(run["tokens"])
        assert run["kv_bytes_peak"] == result.kv_bytes_peak > 0
        assert run["jct_s"] == pytest.approx(run["ttft_s"] + run["tbt_s"] * (len(run["tokens"]) - 1))
    assert document["runs"][3]["guardian"] == vars(lil_ops.Guardian(interval=8, threshold=1000))
    assert document["runs"][3]["policy_options"] == {"budget": 32} and document["runs"][0]["policy_options"] == {}


def test_budgets_of_layers_and_options_of_one_policy(generate, folder):
    layers = hf.AutoConfig.from_pretrained(folder).num_hidden_layers
    rkv = ["--policy", "rkv", "--policy-option", "buffer=8", "--policy-option", "mix=0.07", "--no-compare", "--json"]
    (run,) = json.loads(generate(*rkv, "--budget", "0.5", PROMPT)[1])["runs"]
    assert run["policy_options"] == {"budget": 0.5, "buffer": 8, "mix": 0.07}
    budgets = ",".join(["32"] * layers)
    (run,) = json.loads(generate(*rkv, "--budget", budgets, PROMPT)[1])["runs"]
    assert run["policy_options"]["budget"] == [32] * layers and run["stop_reason"] == "length"
    assert_user_error(generate(*rkv, "--budget", budgets + ",32", PROMPT), "policy rkv: budget: expected one entry for")


def test_what_the_guardian_brings_about(generate):
    fires = ["--guardian", "--interval", "8", "--threshold", "1000", "--no-compare", "--json"]
    answer = ["--action", "answer", "--answer-text", "So:", "--answer-tokens", "5"]
    (run,) = json.loads(generate(*fires, *answer, PROMPT)[1])["runs"]
    assert run["events"] == [[8, "answer"]] and len(run["tokens"]) == 8 + 3 + 5 and run["stop_reason"] == "length"
    assert_user_error(generate(*fires, "--action", "answer", PROMPT), "Answer: text: the chat template has no </think>")
    (run,) = json.loads(generate(*fires, *QUEST, "--loss-aware", "--action", "rescue", PROMPT)[1])["runs"]
    assert run["events"] == [[8, "rescue"]] and len(run["tokens"]) == 16 and run["guardian"]["loss_aware"]
    assert run["policy_options"] == {"budget": 32, "scoring": "meanstd", "sink": 1}
    sink = ["--policy", "sink", "--budget", "32"]
    assert_user_error(generate(*fires, *sink, "--action", "rescue", PROMPT), "Rescue: policy sink has forgotten")


def test_the_prompt_from_standard_input(generate, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO("from a pipe"))
    code, out, _ = generate("--no-compare", "--json", "-")
    assert code == 0 and json.loads(out)["prompt"] == "from a pipe"


def test_threads(generate):
    before = torch.get_num_threads()
    try:
        assert json.loads(generate("--no-compare", "--threads", 1, "--json", PROMPT)[1])["versions"]["threads"] == 1
    finally:
        torch.set_num_threads(before)


def test_the_chat_template_is_the_default(generate, tokenizer):
    _, out, _ = generate("--no-compare", "--json", PROMPT)
    assert json.loads(out)["prompt_ids"] == tokenizer("<user>" + PROMPT).input_ids


def test_an_end_of_sequence_token_ends_the_run_unless_ignored(generate, monkeypatch):
    _, out, _ = generate("--no-compare", "--json", PROMPT)
    third = json.loads(out)["runs"][0]["tokens"][2]
    load = session.load

    def with_eos(*arguments):
        model, tokenizer = load(*arguments)
        model.generation_config.eos_token_id = third
        return model, tokenizer

    monkeypatch.setattr(session, "load", with_eos)
    (run,) = json.loads(generate("--no-compare", "--json", PROMPT)[1])["runs"]
    assert run["stop_reason"] == "eos" and run["tokens"][-1] == third and len(run["tokens"]) <= 3
    (run,) = json.loads(generate("--no-compare", "--json", "--ignore-eos", PROMPT)[1])["runs"]
    assert run["stop_reason"] == "length" and len(run["tokens"]) == 24


EARLY_ERRORS = {
    "empty prompt": ([" "], "the prompt is empty"),
    "not text": (["\udcff"], "the prompt is not UTF-8 text"),
    "no prompt": ([], "(?i:missing argument 'prompt')"),
    "unknown option": (["--buget", "9", "x"], "No such option"),
    "not a number": (["--budget", "many", "x"], "--budget: expected a number of tokens, a share, .*got 'many'"),
    "not a share": (["--policy", "sink", "--budget", "1.5", "x"], "policy sink: budget: expected a share.*got 1.5"),
    "a list too short": (["--policy", "sink", "--budget", "64,2", "x"], "policy sink: budget: expected at least"),
    "no value": ([*QUEST, "--policy-option", "buffer", "x"], "--policy-option: expected NAME=VALUE, got 'buffer'"),
    "not its option": ([*QUEST, "--policy-option", "buffer=9", "x"], "policy quest: unknown option 'buffer'"),
    "unknown policy": (["--policy", "qust", "x"], "unknown policy 'qust'.*did you mean 'quest'"),
    "budget missing": (["--policy", "quest", "x"], "policy quest: budget"),
    "budget too small": (["--policy", "sink", "--budget", "4", "x"], "policy sink: budget: expected at least"),
    "budget below its pages": ([*QUEST, "--page-size", "64", "x"], "policy quest: budget: expected at least 64"),
    "option of another policy": (["--budget", "64", "x"], "policy full.*budget"),
    "sink": ([*QUEST, "--sink", "-1", "x"], "sink: expected at least 0, got -1"),
    "dtype": (["--dtype", "int8", "x"], "Invalid value for '--dtype'.*float16"),
    "device": (["--device", "tpu", "x"], "device: expected cpu, cuda or cuda:N, got 'tpu'"),
    "no such GPU": (["--device", "cuda:99", "x"], "device: got 'cuda:99', but"),
    "temperature": (["--temperature", "-1", "x"], "temperature: expected"),
    "top_k": (["--top-k", "-1", "x"], "top_k: expected"),
    "top_p": (["--top-p", "1.5", "x"], "top_p: expected"),
    "page size": (["--page-size", "7", "x"], "page_size: expected a power of two from 8 to 128, got 7"),
    "max new tokens": (["--max-new-tokens", "0", "x"], "Invalid value for '--max-new-tokens'"),
    "threads": (["--threads", "0", "x"], "Invalid value for '--threads'"),
    "seed": (["--seed", "-1", "x"], "Invalid value for '--seed'"),
    "interval": (["--guardian", "--interval", "0", "x"], "Guardian: interval: expected"),
    "threshold": (["--guardian", "--threshold", "nan", "x"], "Guardian: threshold: expected"),
    "unit": (["--guardian", "--unit", "bytes", "x"], "Invalid value for '--unit'"),
    "bits without a threshold": (["--guardian", "--unit", "bits", "x"], "--unit bits needs --threshold"),
    "loss without Guardian": (["--loss-aware", "x"], "--loss-aware needs --guardian"),
    "action without Guardian": (["--action", "rescue", "x"], "--action rescue needs --guardian"),
    "answer text": ([*GUARDIAN, "--answer-text", "So:", "x"], "--answer-text needs --action answer"),
    "interval without Guardian": (["--interval", "8", "x"], "--interval needs --guardian"),
}


def assert_user_error(outcome: tuple[int, str, str], message: str) -> None:
    code, out, err = outcome
    assert (code, out) == (2, "")
    assert re.match(f"lil-ops: error: .*{message}", err) and err.count("\n") == 1


@pytest.mark.parametrize("case", EARLY_ERRORS)
def test_an_error_before_the_model_is_loaded(generate, monkeypatch, case):
    monkeypatch.setattr(session, "load", lambda *arguments: pytest.fail("the model was loaded"))
    options, message = EARLY_ERRORS[case]
    assert_user_error(generate(*options), message)


def test_an_error_of_the_model(lil, tmp_path):
    (tmp_path / "broken.gguf").write_bytes(b"no model")
    hf.T5Config().save_pretrained(tmp_path / "t5")
    for model, message in [
        ("no/such/model.gguf", "no/such/model.gguf: no such file or folder"),
        (tmp_path / "broken.gguf", "cannot load the model: "),
        (tmp_path / "t5", "cannot load the model: Unrecognized configuration class"),
    ]:
        assert_user_error(lil("generate", "--model", model, PROMPT), re.escape(message))
    assert_user_error(lil("generate", PROMPT), "Missing option '--model'")
    assert_user_error(lil("produce"), "No such command 'produce'")


def test_an_architecture_that_is_not_served(lil, tmp_path, tokenizer):
    hf.MambaForCausalLM(hf.MambaConfig(vocab_size=257, hidden_size=8, num_hidden_layers=1)).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    assert_user_error(lil("generate", "--model", tmp_path, PROMPT), "lil_ops cannot serve model type 'mamba'")


def test_an_error_of_the_prompt(generate, lil, folder, tmp_path):
    long = "x" * 100
    assert_user_error(generate(*QUEST, "--protect-prompt", long), "policy quest: budget.*protect a prompt of 106")
    bare = shutil.copytree(folder, tmp_path / "bare")
    (bare / "chat_template.jinja").unlink()
    assert_user_error(lil("generate", "--model", bare, "--chat", PROMPT), "--chat: .* no chat template")


def test_more_tokens_than_memory(generate):
    assert_user_error(generate("--max-new-tokens", 10**13, "--no-chat", "abc"), "no memory for 10000000000003 tokens")


def test_verbose_lets_the_libraries_speak(generate):
    assert "Loading weights" in generate("--no-compare", "--verbose", PROMPT)[2]


@pytest.mark.parametrize("where", ["load", "prefill", "chosen", "second"])
def test_ctrl_c_in_json_mode_gives_what_was_produced(generate, monkeypatch, where):
    calls = {"prefill": 0, "step": 0}

    def interrupted_at(name, count):
        method = getattr(DecodeLoop, name)

        def call(loop):
            calls[name] += 1
            if calls[name] == count:
                signal.raise_signal(signal.SIGINT)
            return method(loop)

        monkeypatch.setattr(DecodeLoop, name, call)

    if where == "load":
        monkeypatch.setattr(session, "load", lambda *arguments: signal.raise_signal(signal.SIGINT))
    elif where == "prefill":
        interrupted_at("prefill", 2)
    else:
        # The warm-up takes one step, a whole run 23.
        interrupted_at("step", {"chosen": 1 + 5, "second": 1 + 23 + 3}[where])
    code, out, err = generate(*QUEST, "--json", PROMPT)
    document = json.loads(out)
    assert (code, err, document["interrupted"]) == (130, "", True)
    runs = [(run["name"], len(run["tokens"]), run["stop_reason"]) for run in document["runs"]]
    assert (
        runs
        == {
            "load": [],
            "prefill": [("quest", 0, "interrupted")],
            "chosen": [("quest", 5, "interrupted")],
            "second": [("dense", 3, "interrupted"), ("quest", 24, "length")],
        }[where]
    )


def test_ctrl_c_on_a_process_keeps_the_text_and_ends_with_the_table(folder, tokenizer):
    arguments = ["generate", "--model", folder, "--max-new-tokens", "100000", *QUEST, PROMPT]
    process = subprocess.Popen([*LIL_OPS, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    started = os.read(process.stdout.fileno(), 1)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (130, b"")
    out = (started + out).decode()
    rows = table_rows(out)
    assert list(rows) == ["quest"] and rows["quest"][1] == "interrupted"

    model, _ = lil_ops.load_model(folder)
    prompt = tokenizer("<user>" + PROMPT).input_ids
    count = int(rows["quest"][0])
    expected = lil_ops.generate(model, [prompt], policy="quest", budget=32, max_new_tokens=count).tokens[0]
    # Ctrl-C may come when a token is counted but not yet written.
    text = out[: out.index("run  ")].rstrip()
    assert tokenizer.decode(expected).startswith(text) and len(text) > 0


def test_ctrl_c_on_a_terminal_shows_the_cursor_again(folder):
    terminal, side = pty.openpty()
    arguments = ["generate", "--model", folder, "--max-new-tokens", "100000", PROMPT]
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": "100", "LINES": "30"}
    process = subprocess.Popen([*LIL_OPS, *arguments], stdin=side, stdout=side, stderr=side, env=environment)
    os.close(side)
    seen = b""
    while b" TBT " not in seen:
        seen += os.read(terminal, 4096)
    process.send_signal(signal.SIGINT)
    try:
        while chunk := os.read(terminal, 4096):
            seen += chunk
    except OSError:
        # Linux: the process has closed its side.
        pass
    assert process.wait(timeout=60) == 130
    seen = seen.decode(errors="replace")
    assert "loading" in seen and "Loading weights" not in seen and "Traceback" not in seen
    assert seen.rindex("\x1b[?25h") > seen.rindex("\x1b[?25l") and "interrupted" in seen


def event(step: int, token: int, gain: int = -1) -> StepEvent:
    return StepEvent(step, {0: token}, {0: StopReason.RUNNING}, 0.5 if step else 9.0, {0: 3}, {0: gain}, 2**21)


def test_the_terminal_view_commits_whole_lines_and_keeps_a_status_line(tokenizer, monkeypatch):
    monkeypatch.setattr(display, "REFRESH_SECONDS", 0)
    screen = io.StringIO()
    console = Console(file=screen, force_terminal=True, color_system=None, width=80, height=10)
    text = "first \x1b[2Jline\nsecond"
    with RunView(console, "quest + Guardian", Detokenizer(tokenizer)) as view:
        for step, token in enumerate(tokenizer(text).input_ids):
            view.step(event(step, token, gain=7))
        assert "quest + Guardian  21 tokens  TBT 500 ms  LZ77 0.14  gain 7  " in screen.getvalue()
    shown = screen.getvalue()
    assert "\x1b[2J" not in shown.replace("\x1b[2K", "")
    # Without the live region, which is erased line by line, a terminal is left with the text.
    assert "first [2Jline\n" in shown and shown.endswith("second\n")


@pytest.mark.parametrize("text", ["plain", " a  space", "naïve é 例え 🙂🙃", "tail 🙂"])
def test_pieces_of_text_add_up_and_never_split_a_character(tokenizer, text):
    detokenizer = Detokenizer(tokenizer)
    ids = tokenizer(text).input_ids
    pieces = [detokenizer.push(token) for token in ids]
    assert "".join(pieces) == text and "\ufffd" not in "".join(pieces) and detokenizer.rest() == ""
    assert sum(map(bool, pieces)) == len(text)


def test_a_piece_keeps_the_space_that_its_token_has_behind_other_text():
    tokenizer = Tokenizer(models.WordLevel({"▁a": 0, "▁b": 1}))
    tokenizer.decoder = decoders.Metaspace()
    detokenizer = Detokenizer(hf.PreTrainedTokenizerFast(tokenizer_object=tokenizer))
    assert [detokenizer.push(token) for token in (0, 1, 0)] == ["a", " b", " a"]


def test_text_ends_with_what_an_unfinished_character_decodes_to(tokenizer):
    detokenizer = Detokenizer(tokenizer)
    pieces = [detokenizer.push(token) for token in tokenizer("a🙂").input_ids[:-1]]
    assert pieces == ["a", "", "", ""] and detokenizer.rest() == "\ufffd"


def test_special_tokens_have_no_text(tokenizer):
    detokenizer = Detokenizer(tokenizer)
    ids = [*tokenizer("a").input_ids, tokenizer.eos_token_id, *tokenizer("b").input_ids]
    assert [detokenizer.push(token) for token in ids] == ["a", "", "b"]


def test_units():
    assert [seconds(value) for value in (0, 0.00123, 0.0456, 0.789, 1.5, 123.4)] == [
        "-",
        "1.23 ms",
        "45.6 ms",
        "789 ms",
        "1.50 s",
        "123 s",
    ]
    assert [size(value) for value in (0, 1023, 1536, 45 * 2**20, 3 * 2**40)] == [
        "0 B",
        "1023 B",
        "1.50 KiB",
        "45.0 MiB",
        "3.00 TiB",
    ]


def test_info(lil):
    code, out, _ = lil("info", "--json")
    assert code == 0 and json.loads(out) == lil_ops.build_info()
    code, out, _ = lil("info")
    info = lil_ops.build_info()
    assert code == 0 and len(out.splitlines()) == len(info)
    for value in (torch.__version__, info["cuda_library"], ", ".join(info["isas"]), ", ".join(info["devices"])):
        assert value in out


def test_policies(lil):
    code, out, _ = lil("policies")
    assert code == 0
    for name, policy in lil_ops.policies.POLICIES.items():
        assert name in out and policy.source.split()[0] in out
        assert all(option in out for option in lil_ops.policies.options_of(policy))


def test_help(lil):
    code, out, _ = lil("--help")
    assert code == 0 and "generate" in out and "info" in out and "policies" in out
    assert lil() == (code, out, "")
    code, out, _ = lil("generate", "--help")
    defaults = lil_ops.Guardian()
    assert code == 0 and f"({defaults.interval})" in out and f"({defaults.threshold})" in out
    for name in lil_ops.policies.POLICIES:
        assert name in out


def test_without_typer_the_error_says_what_to_install(lil, monkeypatch):
    monkeypatch.setitem(sys.modules, "typer", None)
    monkeypatch.delitem(sys.modules, "lil_ops.cli.app", raising=False)
    for name in ("generate", "info", "policies"):
        monkeypatch.delitem(sys.modules, f"lil_ops.cli.{name}", raising=False)
    assert_user_error(lil("info"), re.escape("the command line needs typer: pip install lil-ops[cli]"))


def test_importing_the_command_line_imports_neither_transformers_nor_typer():
    code = "import sys, lil_ops.cli; assert not {'transformers', 'typer'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)

#!/usr/bin/env python3
"""lil_ops against other cache compression at decode time, on the CPU: same model, prompts and budgets, greedy, float32.

    bench/field.py --kvpress-python ENV/bin/python [--rkv-python ENV/bin/python] [--model FOLDER --prompts FILE.jsonl]

kvpress needs an older transformers than lil_ops, so it lives in an environment of its own; this makes it:

    python3 -m venv ENV && ENV/bin/pip install torch==2.13.0 "kvpress==0.5.*"     # PyTorch's CPU build is enough

R-KV's own code (github.com/Zefan-Cai/R-KV) is on no package index: give an environment in which `import rkv` works
(its patch wants transformers from 4.48.1 to 4.55). What is not given is left out, and the result says so.

Two tasks. SmolLM2 (`make models`): eight prompts of one length, and how far the output agrees with dense decoding.
With --model and --prompts: problems with answers, one JSON object a line, {"prompt": text, "answer": text}; of those
the prompts of the commonest length are taken, so that they can be decoded in one batch. An output's answer is the
last match of --answer's group.

Each method decodes all prompts of a task, in one batch where it can, for what it says; then the first ones alone, for
a fixed number of tokens, for its time and memory: prompt by prompt, all methods in turn, so that whatever else the
machine does meets all of them. One worker process for each environment, all with the same ids.

Progress is kept in build/field: a run that was interrupted goes on; --fresh starts over. Writes
bench/results/field.json and docs/performance.md (report.py). About ten minutes on two cores.
"""

from __future__ import annotations

import argparse
import collections
import hashlib
import json
import os
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

BENCH = Path(__file__).resolve().parent
ROOT = BENCH.parent
SCRATCH = ROOT / "build" / "field"
RESULT = BENCH / "results" / "field.json"
sys.path.insert(0, str(ROOT))

from facts import cpu_name, current_commit, today  # noqa: E402
from report import report  # noqa: E402

WORKERS = {"lil_ops": "field_lil.py", "kvpress": "field_kvpress.py", "R-KV": "field_rkv.py"}

# Our policies, and the presses beside each: those of kvpress that score by the same idea. Quest, which forgets nothing,
# has none; KnormPress and KeyDiffPress are no policy of ours, but KeyDiff, like R-KV, lets go of keys that are alike.
POLICIES = ("sink", "tova", "h2o", "snapkv", "rkv", "quest")
PRESSES = {
    "StreamingLLMPress": "sink",
    "TOVAPress": "tova",
    "ObservedAttentionPress": "h2o",
    "SnapKVPress": "snapkv",
    "KeyDiffPress": "rkv",
    "KnormPress": None,
}
EVERY_STEP = ("StreamingLLMPress", "TOVAPress", "ObservedAttentionPress")  # also as our policies do: at every step


@dataclass(frozen=True)
class Task:
    """``new``: tokens at most. ``timed``: prompts that are decoded alone, for ``timed_new`` tokens each."""

    name: str
    model: Path
    budgets: tuple[int, ...]
    new: int
    timed: int
    timed_new: int


@dataclass(frozen=True)
class Run:
    """One method at one budget. ``beside``: our policy that it stands beside, for the comparison."""

    side: str
    label: str
    budget: int | None
    beside: str | None
    spec: dict

    @property
    def key(self) -> str:
        return f"{self.side}, {self.label}, {self.budget or 'dense'}"


def runs(budgets: tuple[int, ...], sides: list[str], policies: list[str]) -> Iterator[Run]:
    """Dense in each environment, then everything at each budget."""
    dense = {"lil_ops": {"name": "full"}, "kvpress": {"press": None}, "R-KV": {"budget": None, "interval": None}}
    for side in sides:
        yield Run(side, "dense", None, "full", dense[side])
    for budget in budgets:
        interval = budget // 4  # kvpress's own proportion: 512 to 2048
        for name in policies:
            options = {"buffer": interval, "mix": 0.1} if name == "rkv" else {}
            label = f"rkv, every {interval}" if name == "rkv" else name
            yield Run("lil_ops", label, budget, name, {"name": name, "budget": budget, **options})
        if "kvpress" in sides:
            for press, beside in PRESSES.items():
                if press in EVERY_STEP:
                    yield press_run(press, beside, budget, 1)
                yield press_run(press, beside, budget, interval)
        if "R-KV" in sides:
            label = f"rkv, every {interval}"
            yield Run("R-KV", label, budget, "rkv", {"budget": budget, "interval": interval})


def press_run(press: str, beside: str | None, budget: int, interval: int) -> Run:
    """A press at every step leaves room for the new token: its heads read ``budget`` tokens, as ours do. At intervals
    it compresses to the budget, and grows beyond it in between."""
    spec = {"press": press, "options": {}, "interval": interval, "target": budget - (interval == 1)}
    # Only SnapKV looks at hidden states of earlier steps. Its window must be shorter than the interval.
    spec["buffer"] = 0
    if press == "SnapKVPress":
        spec |= {"options": {"window_size": interval // 2}, "buffer": interval}
    if press == "ObservedAttentionPress":
        spec["attention"] = "eager"
    return Run("kvpress", f"{press}, every {'step' if interval == 1 else interval}", budget, beside, spec)


class Worker:
    """A process that answers requests; see field_serve.py."""

    def __init__(self, python: str, file: str, model: Path, threads: int):
        command = [python, str(BENCH / file), "--model", str(model), "--threads", str(threads)]
        quiet = {"OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
        quiet |= {"TRANSFORMERS_VERBOSITY": "error", "PYTHONWARNINGS": "ignore"}
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, env=os.environ | quiet)
        self.versions = self._read()

    def ask(self, **request) -> dict:
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        return self._read()

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait()

    def _read(self) -> dict:
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"{' '.join(self.process.args)}: ended with {self.process.wait()}, see above")
        return json.loads(line)


class Progress:
    """Replies, in a file that a later run of the same measurement goes on with."""

    def __init__(self, path: Path, of_what: dict, fresh: bool):
        self.path, self.replies = path, {}
        head = json.dumps({"of": hashlib.sha256(json.dumps(of_what, sort_keys=True).encode()).hexdigest()})
        lines = path.read_text().splitlines() if path.exists() and not fresh else []
        if lines[:1] == [head]:
            self.replies = dict(json.loads(line) for line in lines[1:])
        else:
            path.write_text(head + "\n")

    def get(self, key: str, make) -> dict:
        if key not in self.replies:
            self.replies[key] = make()
            with self.path.open("a") as file:
                file.write(json.dumps([key, self.replies[key]]) + "\n")
        return self.replies[key]


def dense_copy(source: Path, name: str):
    """A float32 copy of a model that any transformers loads: ``(folder, model, tokenizer)``."""
    import torch

    import lil_ops

    model, tokenizer = lil_ops.load_model(source, dtype=torch.float32)
    folder = SCRATCH / name
    model.save_pretrained(folder)
    # Before version 5 transformers looked for theta here, and takes a default where it finds none.
    config = json.loads((folder / "config.json").read_text())
    config["rope_theta"] = config["rope_parameters"]["rope_theta"]
    (folder / "config.json").write_text(json.dumps(config, indent=1))
    return folder, model, tokenizer


def license_prompts(tokenizer, count: int = 8, length: int = 96) -> list[list[int]]:
    """Chats of one length: "Explain this part of a license", about stretches of the repository's own.

    Shorter than the budget: kvpress would hold a longer prompt whole for a while, and so be dense where ours is not.
    """

    def chat(text: str) -> list[int]:
        turn = [{"role": "user", "content": text}]
        return tokenizer.apply_chat_template(turn, add_generation_prompt=True, return_dict=False)

    words = (ROOT / "LICENSE").read_text().split()
    ask = "Explain this part of a license in plain words, with an example:\n\n"
    chats = [chat(ask + " ".join(words[150 * i : 150 * i + length])) for i in range(count)]
    end = chats[0][len(chats[0]) - common(chats[0][::-1], chat("?")[::-1]) :]  # from the end of the user's turn on
    return [ids[: length - len(end)] + end for ids in chats]


def problems_of(path: Path, tokenizer) -> tuple[list[list[int]], list[str | None]]:
    """Token ids and answers of the prompts of the commonest length."""
    lines = [json.loads(line) for line in path.read_text().splitlines() if line.strip()]
    ids = [tokenizer(line["prompt"])["input_ids"] for line in lines]
    length, _ = collections.Counter(map(len, ids)).most_common(1)[0]
    chosen = [i for i in range(len(ids)) if len(ids[i]) == length]
    return [ids[i] for i in chosen], [lines[i].get("answer") for i in chosen]


def answer_of(text: str, pattern: str) -> str | None:
    """The last match of the pattern's group: what an output answers."""
    found = re.findall(pattern, text)
    return found[-1] if found else None


def common(one: list[int], other: list[int]) -> int:
    """Tokens before the first difference."""
    return next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))


def quality(
    outputs: list[list[int]],
    dense: list[list[int]],
    eos: list[int],
    answers: list[str | None] | None,
    texts: list[str],
    dense_texts: list[str],
    pattern: str,
) -> dict:
    """What a method's outputs say, beside those of dense decoding."""
    pairs = list(zip(outputs, dense, strict=True))
    row = {
        "problems": len(outputs),
        "length": round(statistics.mean(map(len, outputs)), 1),
        "ended": sum(output[-1] in eos for output in outputs),
        "identical": sum(one == other for one, other in pairs),
        "agree": round(statistics.mean(common(one, other) / max(len(one), len(other)) for one, other in pairs), 3),
    }
    if answers is not None:
        given = [answer_of(text, pattern) for text in texts]
        wanted = [answer_of(text, pattern) for text in dense_texts]
        row["same_answer"] = sum(a is not None and a == b for a, b in zip(given, wanted, strict=True))
        row["right"] = sum(a is not None and a == b for a, b in zip(given, answers, strict=True))
    return row


def row_of(run: Run, alone: list[dict], compared: dict) -> dict:
    """A method's figures; time and memory are those of sequences alone."""
    seconds = [second for reply in alone for second in reply["step_seconds"]]
    resident = [reply["rss_bytes"] for reply in alone if reply["rss_bytes"]]
    return {
        "side": run.side,
        "method": run.label,
        "budget": run.budget,
        "beside": run.beside,
        "tbt_ms": round(statistics.median(seconds) * 1e3, 3),
        "tbt_mean_ms": round(statistics.mean(seconds) * 1e3, 3),
        **{name: max(reply[name] for reply in alone) for name in ("kv_bytes", "state_bytes")},
        "rss_bytes": max(resident, default=None),
        **compared,
    }


def measure(task: Task, prompts, answers, model, tokenizer, pythons: dict, options: argparse.Namespace) -> dict:
    from lil_ops.policies import POLICIES as OURS

    policies = [name for name in POLICIES if name in OURS]
    left_out = [f"lil_ops has no policy {name!r}" for name in POLICIES if name not in policies]
    left_out += [f"no environment was given for {side}" for side in WORKERS if side not in pythons]
    todo = list(runs(task.budgets, list(pythons), policies))
    eos = model.generation_config.eos_token_id
    eos = eos if isinstance(eos, list) else [eos]
    workers = {side: Worker(python, WORKERS[side], task.model, options.threads) for side, python in pythons.items()}
    versions = {side: worker.versions for side, worker in workers.items()}
    of_what = {
        "task": asdict(task) | {"model": None},
        "runs": [asdict(run) for run in todo],
        "prompts": prompts,
        "versions": versions,
        "sources": [(BENCH / file).read_text() for file in ("field_serve.py", *WORKERS.values())],
        "commit": current_commit(),
        "threads": options.threads,
    }
    file = SCRATCH / f"{task.name}{'-quick' if options.quick else ''}.jsonl"
    progress = Progress(file, of_what, options.fresh)
    steps = len(todo) * (1 + task.timed)

    def ask(what: str, run: Run, **request) -> dict:
        before = time.perf_counter()
        reply = progress.get(f"{what}, {run.key}", lambda: workers[run.side].ask(spec=run.spec, **request))
        done, seconds = len(progress.replies), time.perf_counter() - before
        print(f"{task.name} {done}/{steps}: {what}, {run.key}: {seconds:.1f} s", flush=True)
        return reply

    said = {run.key: ask("all", run, prompts=prompts, new=task.new, eos=eos) for run in todo}
    left_out += [f"{key}: {reply['error']}" for key, reply in said.items() if "error" in reply]
    todo = [run for run in todo if "error" not in said[run.key]]
    alone: dict[str, list[dict]] = collections.defaultdict(list)
    for i in range(min(task.timed, len(prompts))):
        for run in todo:
            alone[run.key].append(ask(f"alone {i}", run, prompts=[prompts[i]], new=task.timed_new, eos=[]))
    for worker in workers.values():
        worker.close()
    for line in left_out:
        print(f"{task.name}: left out: {line}", flush=True)

    dense = said[todo[0].key]["tokens"]
    rows = []
    for run in todo:
        outputs = said[run.key]["tokens"]
        texts = tokenizer.batch_decode(outputs), tokenizer.batch_decode(dense)
        rows.append(row_of(run, alone[run.key], quality(outputs, dense, eos, answers, *texts, options.answer)))
    facts = {"new": task.new, "timed": task.timed, "timed_new": task.timed_new, "prompt": len(prompts[0])}
    shape = {"parameters": sum(p.numel() for p in model.parameters()), "layers": model.config.num_hidden_layers}
    return {"name": task.name, "versions": versions, "left_out": left_out, **facts, **shape, "rows": rows}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kvpress-python", help="the python of an environment that has kvpress")
    parser.add_argument("--rkv-python", help="the python of an environment that has R-KV's own package, rkv")
    parser.add_argument("--smollm2", type=Path, default=ROOT / "models" / "SmolLM2-135M-Instruct")
    parser.add_argument("--model", type=Path, help="a model that works out problems with answers")
    parser.add_argument("--prompts", type=Path, help="its problems, JSON lines")
    parser.add_argument("--answer", default=r"#(\d+)", help="a pattern whose group is an output's answer")
    parser.add_argument("--only", choices=["problems", "smollm2"], help="one task; the result keeps the other's rows")
    parser.add_argument("--limit", type=int, help="so many prompts of each task at most")
    parser.add_argument("--quick", action="store_true", help="a small run, to try it; its result stays in build")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--fresh", action="store_true", help="forget what an interrupted run has measured")
    arguments = parser.parse_args()
    if (arguments.model is None) != (arguments.prompts is None):
        parser.error("--model and --prompts go together")
    pythons = {"lil_ops": sys.executable, "kvpress": arguments.kvpress_python, "R-KV": arguments.rkv_python}
    pythons = {side: python for side, python in pythons.items() if python}
    SCRATCH.mkdir(parents=True, exist_ok=True)

    result_file = SCRATCH / "quick.json" if arguments.quick else RESULT
    limit = 2 if arguments.quick else arguments.limit
    tasks = {}
    if result_file.exists() and arguments.only:
        tasks = {task["name"]: task for task in json.loads(result_file.read_text())["tasks"]}
    if arguments.model and arguments.only != "smollm2":
        folder, model, tokenizer = dense_copy(arguments.model, "problems-model")
        prompts, answers = problems_of(arguments.prompts, tokenizer)
        task = Task("problems", folder, budgets=(128, 256), new=512, timed=2, timed_new=256)
        task = replace(task, new=40, timed=1, timed_new=40) if arguments.quick else task
        found = measure(task, prompts[:limit], answers[:limit], model, tokenizer, pythons, arguments)
        tasks["problems"] = found
    if arguments.only != "problems":
        folder, model, tokenizer = dense_copy(arguments.smollm2, "smollm2-model")
        task = Task("smollm2", folder, budgets=(128,), new=96, timed=1, timed_new=64)
        task = replace(task, new=12, timed_new=6) if arguments.quick else task
        tasks["smollm2"] = measure(task, license_prompts(tokenizer)[:limit], None, model, tokenizer, pythons, arguments)

    result = {
        "date": today(),
        "commit": current_commit(),
        "machine": {"cpu": cpu_name(), "threads": arguments.threads},
        "command": " ".join(["bench/field.py", *("..." if "/" in word else word for word in sys.argv[1:])]),
        "tasks": list(tasks.values()),
    }
    result_file.parent.mkdir(exist_ok=True)
    result_file.write_text(json.dumps(result, indent=1) + "\n")
    if not arguments.quick:
        report()


if __name__ == "__main__":
    main()

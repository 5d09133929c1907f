#!/usr/bin/env python3
"""The runs of docs/results: bench/evidence.py SET --model MODEL --data FILE --out FOLDER [--jobs N] [-- EVAL OPTIONS]

A set is a list of `lil-ops eval` commands, run N at a time, each with a log beside its results. What is there already
is not run again. Options behind -- go to every command; they come last, and so win. `--list` prints the commands.
"""

from __future__ import annotations

import argparse
import os
import shlex
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

CLI = "from lil_ops.cli import main; main()"  # `lil-ops` of this checkout


class Part(NamedTuple):
    """One command: policies, budgets and stop rules, each comma-separated."""

    policy: str
    budget: str = ""
    stop: str = "off"


class Set(NamedTuple):
    """options: of all its parts. Parts: the longest first."""

    options: list[str]
    parts: list[Part]


FIXED = "guardian:64:5,guardian:250:20"
ANSWER = "guardian:64:5+answer"
ACTIONS = f"{ANSWER},guardian:64:5+rescue,guardian:64:5+rescue+answer"
LOSS = "loss:64:5:1,loss:64:5:0.25,loss:64:5:4,loss:250:20:1"


def free(budgets: dict[str, str]) -> list[Part]:
    """Without a stop rule; ``budgets`` by policy."""
    return [Part(policy, budget) for policy, budget in budgets.items()] + [Part("full")]


PROTECTED = [f"{policy}:protect_prompt=true" for policy in ("rkv", "h2o:recent=32", "tova", "sink")]
EVERY = "64,96,128,192,256"
TINY12 = {
    "quest": EVERY, "quest:scoring=meanstd": EVERY, "snapkv": EVERY, "infllm": EVERY, "lessismore": EVERY,
    "raas": "128,192,256", "rkv": EVERY, "h2o": EVERY, "tova": EVERY, "sink": EVERY,
} | dict.fromkeys(PROTECTED, "128,160,208,256")  # fmt: skip
TINY20 = {
    "quest": "64,96,128,192", "quest:scoring=meanstd": "64,96,128,192", "snapkv": "96,128,192", "raas": "256,320,384",
    "lessismore": "128,256", "infllm": "128,256",
} | dict.fromkeys(PROTECTED, "256,384")  # fmt: skip
TINY = ["--batch", "500", "--answer", r"regex:#(\d\d)", "--answer-text", "#", "--answer-tokens", "4"]
GSM8K = ["--limit", "100", "--batch", "100", "--max-new-tokens", "2048", "--temperature", "0.6", "--answer", "math"]
GSM8K += ["--answer-text", "\n\nThe final answer is \\boxed{", "--answer-tokens", "48"]
ONCE = "{question}\n\nReason step by step, and put the final answer in \\boxed{}."
CHECKED = (
    "{question}\n\nReason step by step. Then check the result in three different ways, and work it out anew if a check "
    "fails. Put the final answer in \\boxed{} at the very end."
)


def tiny(tokens: int, near: str, budgets: dict[str, str]) -> dict[str, Set]:
    """The grid without stop rules; and, beside the runs that they are compared with, stop rules with Quest at the
    budgets ``near`` which it falls, and with some policies that hold no more than the budget."""
    options = [*TINY, "--max-new-tokens", str(tokens)]
    ruled = [
        Part("quest", near, f"off,{ACTIONS}"),
        Part("full", stop=f"off,{FIXED},{ANSWER},guardian:250:20+answer"),
        Part("quest", near, LOSS),
        Part("quest:scoring=meanstd:sink=1", near, f"off,{LOSS}"),  # what a rule that looks at the loss makes of Quest
        Part("quest", near, FIXED),
        *[Part(policy, "96", "off,guardian:64:5+rescue") for policy in ("infllm", "lessismore")],
        *[Part(policy, budgets[policy], f"off,{ANSWER}") for policy in ("raas", "snapkv", *PROTECTED)],
    ]
    return {"": Set(options, free(budgets)), "-ruled": Set(options, ruled)}


def gsm8k(template: str, near: tuple[str, str]) -> dict[str, Set]:
    """A command for each run: they are long. Policies that hold everything are spread, for the sake of memory. near:
    Quest's budgets under stop rules."""
    free = ["quest 64", "infllm 64", "sink 64", "h2o 64", "full", "raas 256", "quest 128", "h2o 128", "sink 128",
            "infllm 128", "raas 320", "h2o 256", "quest 256", "sink 256", "raas 384", "infllm 256"]  # fmt: skip
    ruled = [
        *[Part("quest", budget, stop) for stop in (*ACTIONS.split(","), "loss:64:5:1") for budget in near],
        *[Part(policy, "128", ANSWER) for policy in ("h2o", "sink", "infllm")],
        *[Part("full", stop=f"{stop},{stop}+answer") for stop in FIXED.split(",")],
        Part("quest", near[1], f"{FIXED},guardian:250:20+answer"),
    ]
    options = [*GSM8K, "--template", template]
    return {"": Set(options, [Part(*run.split()) for run in free]), "-ruled": Set(options, ruled)}


def reasoning_gym() -> dict[str, Set]:
    """Problems of a generator, with what attention loses: told by minmax as a bound, by meanstd as an estimate."""
    options = [*GSM8K, "--max-new-tokens", "1024", "--measure-loss", "--template", ONCE]
    free = {"quest": "64,128,256", "quest:scoring=meanstd": "64,128,256"}
    free |= dict.fromkeys(("infllm", "h2o", "sink"), "128,256") | {"raas": "256,320"}
    ruled = [Part("quest", budget, f"guardian:64:5,{ACTIONS}") for budget in ("64", "128")]
    ruled.append(Part("full", stop=f"{FIXED},{ANSWER}"))
    parts = [Part(policy, budget) for policy, budgets in free.items() for budget in budgets.split(",")]
    return {"": Set(options, [*parts, Part("full")]), "-ruled": Set(options, ruled)}


SETS = {
    name + end: found
    for name, both in {
        "tiny12": tiny(1500, "64,96,128", TINY12),
        "tiny20": tiny(2500, "64,96,128", TINY20),
        "gsm8k": gsm8k(ONCE, ("64", "128")),
        "gsm8k-check": gsm8k(CHECKED, ("128", "256")),
        "reasoning-gym": reasoning_gym(),
    }.items()
    for end, found in both.items()
}


def command(options: argparse.Namespace, part: Part, shared: list[str]) -> list[str]:
    budget = ["--budget", part.budget] if part.budget else []
    where = ["--model", options.model, "--data", options.data, "--out", str(options.out)]
    which = ["--policy", part.policy, *budget, "--stop", part.stop]
    return [sys.executable, "-c", CLI, "eval", *where, *which, *shared, *options.more]


def run(arguments: list[str], log: Path) -> bool:
    """Whether it ended well; a part that no prompt fits in is told in its log."""
    with log.open("ab") as file:
        done = subprocess.run(arguments, stdout=file, stderr=subprocess.STDOUT, env=os.environ | {"COLUMNS": "160"})
    print(f"{log}: {'done' if done.returncode == 0 else f'exit code {done.returncode}'}", flush=True)
    return done.returncode == 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("set", choices=SETS)
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--list", action="store_true")
    own, more = sys.argv[1:], []
    if "--" in own:
        own, more = own[: own.index("--")], own[own.index("--") + 1 :]
    options = parser.parse_args(own)
    options.more = more
    shared, parts = SETS[options.set]
    commands = [command(options, part, shared) for part in parts]
    if options.list:
        print(*map(shlex.join, commands), sep="\n")
        return 0
    options.out.mkdir(parents=True, exist_ok=True)
    logs = [options.out / f"{options.set}-{number}.log" for number in range(len(parts))]
    with ThreadPoolExecutor(options.jobs) as pool:
        return 0 if all(list(pool.map(run, commands, logs))) else 1


if __name__ == "__main__":
    sys.exit(main())

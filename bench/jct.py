#!/usr/bin/env python3
"""JCT end to end, long prompts: Quest and Guardian beside dense transformers.

    bench/jct.py --model FOLDER --data PROBLEMS.jsonl [--device cuda] [--out FILE]

A batch of GSM8K problems, each behind so many solved ones that its prompt has the context's length, asks for a checked
result. Greedy. The JCT of a problem runs from the batch's start to its own last token; compiling is not in it, each way
runs a few tokens before. *transformers*: `generate` with sdpa and its growing cache; *static*: its static cache and
compiled step. *lil*: the `Engine`, its step compiled and, on a GPU, in a CUDA graph.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import sys
import time
import warnings
from pathlib import Path

import torch
import transformers as hf

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from facts import add_commit, facts

import lil_ops
from lil_ops import Engine, Guardian, Request
from lil_ops.evaluation import data as sources
from lil_ops.evaluation.answers import checker
from lil_ops.evaluation.data import Problem

BENCH = Path(__file__).resolve().parent
TASK = "\n\nNow solve this problem. Reason step by step, then check the result in three different ways. End with the final answer in \\boxed{}.\n\n"  # noqa: E501
WAYS = {
    "transformers": {},
    "static": {"cache_implementation": "static"},
    "lil dense": {"policy": "full"},
    "lil dense, guardian": {"policy": "full", "guardian": Guardian(64, 5)},
    "lil quest": {"policy": "quest", "budget": 1024},
    "lil quest, guardian": {"policy": "quest", "budget": 1024, "guardian": Guardian(64, 5)},
}


def prompt_of(tokenizer, problem: Problem, solved: list[dict], tokens: int) -> list[int]:
    """The problem behind as many solved ones as ``tokens`` allow."""
    head, used = "Here are solved problems.", 200 + len(tokenizer(problem.question).input_ids)
    for each in solved:
        text = f"\n\nProblem: {each['question']}\nSolution: {each['answer']}"
        used += len(tokenizer(text).input_ids)
        if used > tokens:
            break
        head += text
    turns = [{"role": "user", "content": head + TASK + problem.question}]
    return tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_dict=False)


class Clock(hf.StoppingCriteria):
    """Notes when each sequence ended, and stops after ``most`` tokens (a smaller `max_new_tokens` would make a static
    cache of another size, to be compiled anew)."""

    def __init__(self, eos: list[int], most: int, device: torch.device):
        self.eos, self.most, self.count = torch.tensor(eos, device=device), most, 0
        self.start, self.ends, self.first = 0.0, {}, 0.0

    def __call__(self, input_ids, scores, **kwargs):
        ended = torch.isin(input_ids[:, -1], self.eos).tolist()
        now = time.perf_counter() - self.start
        self.first = self.first or now
        for row, done in enumerate(ended):
            if done:
                self.ends.setdefault(row, now)
        self.count += 1
        return torch.full((len(input_ids),), self.count >= self.most, device=input_ids.device)


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def with_transformers(model, prompts: list[list[int]], most: int, options: dict) -> dict:
    pad, longest = model.generation_config.pad_token_id, max(map(len, prompts))
    ids = torch.tensor([[pad] * (longest - len(prompt)) + prompt for prompt in prompts], device=model.device)
    mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts], device=model.device)
    eos = lil_ops.loop.eos_ids(model, None)
    for tokens in (4, most):
        clock = Clock(eos, tokens, model.device)
        wait(model.device)
        clock.start = time.perf_counter()
        out = model.generate(
            ids, attention_mask=mask, do_sample=False, max_new_tokens=most, stopping_criteria=[clock], **options
        )
        wait(model.device)
        whole = time.perf_counter() - clock.start
    outputs = out[:, longest:].tolist()
    outputs = [next((row[: i + 1] for i, token in enumerate(row) if token in eos), row) for row in outputs]
    return {"outputs": outputs, "jct": [clock.ends.get(row, whole) for row in range(len(outputs))], "ttft": clock.first}


def with_engine(model, prompts: list[list[int]], most: int, options: dict) -> dict:
    longest = max(map(len, prompts))
    with Engine(model, slots=len(prompts), max_tokens=longest + most, compile=True, **options) as engine:
        list(engine.run([Request(prompt[:64], 4) for prompt in prompts]))
        engine.synchronize()
        start, ends, outputs = time.perf_counter(), {}, {}
        for row, prompt in enumerate(prompts):
            engine.add(Request(prompt, most, seed=row))
        engine.synchronize()
        first = time.perf_counter() - start
        while engine.free_slots < len(prompts):
            engine.step()
            for done in engine.completed():
                ends[done.request.seed] = time.perf_counter() - start
                outputs[done.request.seed] = done.tokens
    rows = range(len(prompts))
    return {"outputs": [outputs[i] for i in rows], "jct": [ends[i] for i in rows], "ttft": first}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", required=True, help="GSM8K-style JSONL")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--contexts", type=int, nargs="+", default=[8000, 30000])
    parser.add_argument("--problems", type=int, default=16, help="the batch")
    parser.add_argument("--max-new-tokens", type=int, default=1024)
    parser.add_argument("--ways", nargs="+", default=list(WAYS), choices=WAYS)
    parser.add_argument("--out", type=Path, default=BENCH / "results" / "jct.json")
    add_commit(parser)
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    model, tokenizer = lil_ops.load_model(arguments.model, dtype=torch.bfloat16, device=arguments.device)
    model.generation_config.update(temperature=None, top_p=None, top_k=None, repetition_penalty=1.0)
    problems = sources.load(arguments.data, None, None, None, arguments.problems)
    solved = [json.loads(line) for line in Path(arguments.data).read_text(encoding="utf-8").splitlines()][
        arguments.problems :
    ]
    check, rows = checker("math"), []
    result = facts(model.device, arguments.commit) | {"model": Path(arguments.model).name, "rows": rows}
    for context in arguments.contexts:
        prompts = [prompt_of(tokenizer, problem, solved, context) for problem in problems]
        for way in arguments.ways:
            run = with_transformers if way in ("transformers", "static") else with_engine
            if run is with_transformers:
                model.set_attn_implementation("sdpa")
            row = {"context": round(statistics.mean(map(len, prompts))), "way": way}
            try:
                found = run(model, prompts, arguments.max_new_tokens, WAYS[way])
                texts = [tokenizer.decode(output, skip_special_tokens=True) for output in found["outputs"]]
                right = [check.check(text, problem.answer)[1] for text, problem in zip(texts, problems, strict=True)]
                row |= {
                    "n": len(problems),
                    "right": sum(right),
                    "tokens": statistics.mean(map(len, found["outputs"])),
                    "ttft_s": round(found["ttft"], 3),
                    "jct_s": round(statistics.mean(found["jct"]), 3),
                    "batch_s": round(max(found["jct"]), 3),
                    "ended": sum(len(output) < arguments.max_new_tokens for output in found["outputs"]),
                }
            except Exception as error:
                row["error"] = f"{type(error).__name__}: {error}".partition("\n")[0][:200]
            torch._dynamo.reset()
            gc.collect()
            if model.device.type == "cuda":
                torch.cuda.empty_cache()
            rows.append(row)
            arguments.out.write_text(json.dumps(result, indent=1) + "\n")
            print(row, flush=True)


if __name__ == "__main__":
    main()

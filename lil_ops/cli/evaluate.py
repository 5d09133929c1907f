"""lil-ops eval: a model on problems, with every policy, budget and stop rule that is asked for."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from lil_ops.cli import checks, session
from lil_ops.cli.errors import UserError, user_errors
from lil_ops.cli.options import listed, option

if TYPE_CHECKING:
    from rich.console import Console

    from lil_ops.evaluation import records
    from lil_ops.evaluation.answers import Checker
    from lil_ops.evaluation.data import Problem
    from lil_ops.evaluation.grid import Combination
    from lil_ops.evaluation.runner import Runner

GRID, PROBLEMS, GENERATION, MODEL = "What runs", "Problems and answers", "Generation", "Model and machine"
LOOP_OPTIONS = ("max_new_tokens", "temperature", "top_k", "top_p", "page_size")


def evaluate(
    context: typer.Context,
    model: Annotated[str, option(MODEL, "GGUF file, model folder or Hugging Face id.")],
    data: Annotated[str, option(PROBLEMS, "A .jsonl file, reasoning_gym:NAME:SEED:COUNT, or hf:NAME[:CONFIG]:SPLIT.")],
    out: Annotated[Path, option(GRID, "Folder for the results, one file a combination; what is finished is skipped.")],
    policy: Annotated[
        str,
        option(GRID, "Policies, comma-separated; one may have options: quest:scoring=meanstd.", show_default=True),
    ] = "full",
    budget: Annotated[
        str | None, option(GRID, "Budgets in tokens, comma-separated; each policy that takes one runs with each.")
    ] = None,
    stop: Annotated[
        str,
        option(
            GRID,
            "Stop rules, comma-separated: off, guardian[:INTERVAL:THRESHOLD[:bits]], loss[:INTERVAL:THRESHOLD[:WEIGHT]]"
            ", repetition, tokens:COUNT; +answer, +rescue or +rescue+answer behind one for what it brings about.",
            show_default=True,
        ),
    ] = "off",
    question_field: Annotated[
        str | None, option(PROBLEMS, "Field of the question.", show_default="question, problem or prompt")
    ] = None,
    answer_field: Annotated[
        str | None, option(PROBLEMS, "Field of the right answer.", show_default="answer or solution")
    ] = None,
    id_field: Annotated[
        str | None, option(PROBLEMS, "Field that names a problem.", show_default="id, unique_id or its number")
    ] = None,
    limit: Annotated[int | None, option(PROBLEMS, "Only the first so many problems.", min=1)] = None,
    template: Annotated[
        str, option(PROBLEMS, "The prompt's text; {question} stands for the question.", show_default=True)
    ] = "{question}",
    chat: Annotated[
        bool | None, option(PROBLEMS, "Put that into the chat template.", show_default="where there is one")
    ] = None,
    answer: Annotated[
        str,
        option(PROBLEMS, "How to find the answer in a text: math, boxed, number or regex:PATTERN.", show_default=True),
    ] = "math",
    answer_text: Annotated[
        str | None,
        option(GRID, "What closes the thinking for +answer.", show_default="</think>, if the template has it"),
    ] = None,
    answer_tokens: Annotated[int, option(GRID, "The most tokens of such an answer.", show_default=True, min=1)] = 256,
    max_new_tokens: Annotated[int, option(GENERATION, "The most tokens to generate.", show_default=True, min=1)] = 1024,
    ignore_eos: Annotated[bool, option(GENERATION, "Go on after an end-of-sequence token.", "--ignore-eos")] = False,
    temperature: Annotated[float, option(GENERATION, "0 is greedy.", show_default=True)] = 0.0,
    top_k: Annotated[int, option(GENERATION, "Draw from the k likeliest tokens; 0 is all.", show_default=True)] = 0,
    top_p: Annotated[
        float, option(GENERATION, "Draw from the likeliest tokens of this share.", show_default=True)
    ] = 1.0,
    seed: Annotated[
        int, option(GENERATION, "Of the draws, with each problem's id.", show_default=True, min=0, metavar="<int>")
    ] = 0,
    batch: Annotated[int, option(GENERATION, "Problems decoded at once.", show_default=True, min=1)] = 8,
    engine: Annotated[
        bool, option(GENERATION, "Serve a batch by the engine: on CUDA a step is one graph.", "--engine")
    ] = False,
    measure_loss: Annotated[
        bool,
        option(GENERATION, "Record what attention loses, for policies that tell it: quest, full.", "--measure-loss"),
    ] = False,
    dtype: Annotated[
        Literal["float32", "bfloat16", "float16"] | None,
        option(MODEL, "Of weights and KV cache.", show_default="the checkpoint's; float32 for GGUF"),
    ] = None,
    device: Annotated[str, option(MODEL, "cpu, cuda or cuda:N.", show_default=True)] = "cpu",
    threads: Annotated[int | None, option(MODEL, "CPU threads.", show_default="torch's choice", min=1)] = None,
    page_size: Annotated[int, option(MODEL, "Tokens in a page: 8, 16, 32, 64 or 128.", show_default=True)] = 16,
    verbose: Annotated[bool, option(MODEL, "Show the libraries' notices and warnings.", "--verbose")] = False,
) -> None:
    """Run a model on problems: every policy with every budget under every stop rule.

    Each combination has a JSON-lines file of its own in the folder: its settings, then a line for each problem with its
    tokens, text, answer, whether that is right, times and cache bytes. The same command again goes on where it was
    interrupted, and loses no batch that was finished. `lil-ops report` and `lil-ops replay` read the files.
    """
    from rich.console import Console
    from rich.text import Text

    from lil_ops.cli.eval_display import print_summary
    from lil_ops.evaluation import answers, grid
    from lil_ops.evaluation import data as sources
    from lil_ops.evaluation.extras import MissingExtraError

    options = context.params
    if "{question}" not in template:
        raise UserError(f"--template: expected {{question}} in it, got {template!r}")
    with user_errors(ValueError, MissingExtraError):
        budgets = listed(budget, "budget") if budget is not None else []
        combinations = grid.grid(listed(policy, "policy"), budgets, listed(stop, "stop"))
        for each in combinations:
            checks.check_decoding(each.policy, each.policy_options, page_size, temperature, top_k, top_p)
        checker = answers.checker(answer)
        problems = sources.load(data, question_field, answer_field, id_field, limit)
    checks.check_device(device)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot make the folder {out}: {error.strerror}") from error

    console, errors = Console(), Console(stderr=True)
    try:
        with console.status(Text(f"loading {model}")), nullcontext() if verbose else session.quiet():
            network, tokenizer = session.load(model, dtype, device, threads)
            runner = _runner(network, tokenizer, problems, checker, options, combinations)
            refused = _refused(runner, combinations)
        if len(refused) == len(combinations):
            raise UserError(next(iter(refused.values())))
        for name, reason in refused.items():
            errors.print(Text(f"left out: {name}: {reason}"), soft_wrap=True)
        settings = _settings(runner, sources.fingerprint(problems), options)
        runs = [_run(runner, each, settings, out, console, errors) for each in combinations if each.name not in refused]
    except KeyboardInterrupt:
        errors.print(Text(f"interrupted; the same command goes on from here: {out}"), soft_wrap=True)
        raise typer.Exit(130) from None
    print_summary(console, runs)


def _runner(
    network,
    tokenizer,
    problems: list[Problem],
    checker: Checker,
    options: dict,
    combinations: list[Combination],
) -> Runner:
    """The model with the problems' prompts."""
    from lil_ops import Answer
    from lil_ops.evaluation import stops
    from lil_ops.evaluation.runner import Runner

    prompts = []
    for problem in problems:
        text = options["template"].replace("{question}", problem.question)
        prompts.append(session.encode(tokenizer, text, options["chat"]))
        if not prompts[-1]:
            raise UserError(f"problem {problem.id!r}: the prompt is empty")
    loop_options = {name: options[name] for name in LOOP_OPTIONS}
    if options["ignore_eos"]:
        loop_options["eos_token_id"] = ()
    final = None
    if any(stops.answers(each.stop) for each in combinations):
        with user_errors(ValueError):
            final = Answer.from_tokenizer(tokenizer, options["answer_text"], options["answer_tokens"])
    return Runner(
        model=network,
        tokenizer=tokenizer,
        problems=problems,
        prompts=prompts,
        checker=checker,
        loop_options=loop_options,
        seed=options["seed"],
        batch=options["batch"],
        answer=final,
        engine=options["engine"],
        measure_loss=options["measure_loss"],
    )


def _refused(runner: Runner, combinations: list[Combination]) -> dict[str, str]:
    """Combinations that cannot run these prompts, and why: told before hours are spent on the others."""
    refused = {}
    for each in combinations:
        try:
            runner.check(each)
        except ValueError as error:
            refused[each.name] = str(error)
    return refused


def _settings(runner: Runner, fingerprint: str, options: dict) -> dict:
    """Of all combinations: what results depend on. Options that say which they are, or how they look, are not in it."""
    chat = options["chat"]
    return {
        **{name: options[name] for name in ("model", "data", "template", "ignore_eos", "seed", "batch", "device")},
        **{name: options[name] for name in ("answer_text", "answer_tokens")},
        **{name: options[name] for name in LOOP_OPTIONS},
        **{name: True for name in ("engine", "measure_loss") if options[name]},
        "answer_by": options["answer"],
        "chat": bool(runner.tokenizer.chat_template) if chat is None else chat,
        "dtype": str(runner.model.dtype).removeprefix("torch."),
        "problems": len(runner.problems),
        "problems_sha256": fingerprint,
        "vocab_size": runner.model.get_input_embeddings().num_embeddings,
    }


def _run(
    runner: Runner, combination: Combination, shared: dict, out: Path, console: Console, errors: Console
) -> records.Run:
    """One combination, or what is missing of it, into its file."""
    from rich.text import Text

    from lil_ops.cli.eval_display import GridView
    from lil_ops.evaluation import records
    from lil_ops.evaluation.environment import environment

    path, settings = out / f"{combination.name}.jsonl", {**shared, **vars(combination)}
    with user_errors(ValueError):
        run = records.packed(path, settings)
    if run:
        with GridView(console, combination.name, len(runner.problems), len(run.records)) as view:
            view.line(run)
        return run
    with user_errors(ValueError), records.Writer(path, settings, environment()) as writer:
        for damage in writer.run.damaged:
            errors.print(Text(f"{path}, {damage}: skipped; what is missing runs again"), soft_wrap=True)
        with GridView(console, combination.name, len(runner.problems), len(writer.run.records)) as view:
            for batch in runner.run(combination, writer, view.step):
                view.finished(len(batch))
    run = records.read(path)
    view.line(run)
    return run

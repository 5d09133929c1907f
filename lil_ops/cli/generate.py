"""lil-ops generate: one prompt, decoded with a policy and an early stop, and beside it the dense model."""

from __future__ import annotations

import json
import sys
from contextlib import nullcontext
from typing import Annotated, Literal

import typer

from lil_ops.cli import checks, session
from lil_ops.cli.options import option as _option
from lil_ops.cli.runs import Decoder, Outcome, make_action, plan
from lil_ops.text import Detokenizer

POLICY, STOP, GENERATION, MODEL, OUTPUT = "Policy", "Early stop", "Generation", "Model and machine", "Output"
POLICY_OPTIONS = ("sink", "recent", "protect_prompt", "dense_layers", "scoring", "summary_dtype")
GUARDIAN_OPTIONS = ("interval", "threshold", "unit", "loss_aware")
LOOP_OPTIONS = ("max_new_tokens", "temperature", "top_k", "top_p", "seed", "page_size")


def generate(
    context: typer.Context,
    prompt: Annotated[str, typer.Argument(help="The prompt; - reads it from standard input.", show_default=False)],
    model: Annotated[str, _option(MODEL, "GGUF file, model folder or Hugging Face id.")],
    dtype: Annotated[
        Literal["float32", "bfloat16", "float16"] | None,
        _option(MODEL, "Of weights and KV cache.", show_default="the checkpoint's; float32 for GGUF"),
    ] = None,
    device: Annotated[str, _option(MODEL, "cpu, cuda or cuda:N.", show_default=True)] = "cpu",
    threads: Annotated[int | None, _option(MODEL, "CPU threads.", show_default="torch's choice", min=1)] = None,
    page_size: Annotated[int, _option(MODEL, "Tokens in a page: 8, 16, 32, 64 or 128.", show_default=True)] = 16,
    policy: Annotated[
        str,
        _option(
            POLICY,
            "full, sink, h2o, quest, infllm, raas, snapkv, tova, rkv or lessismore: see lil-ops policies.",
            show_default=True,
        ),
    ] = "full",
    budget: Annotated[
        str | None,
        _option(
            POLICY,
            "Tokens a KV head may read, all included: a number; a share (0.25) of prompt and output; or a list of "
            "these, one for each layer (64,64,0.5,...).",
            metavar="TOKENS",
        ),
    ] = None,
    sink: Annotated[int | None, _option(POLICY, "Tokens at the start that are always read.")] = None,
    recent: Annotated[int | None, _option(POLICY, "Tokens at the end that are always read.")] = None,
    protect_prompt: Annotated[bool | None, _option(POLICY, "Whether the whole prompt is always read.")] = None,
    dense_layers: Annotated[int | None, _option(POLICY, "Layers, from the first on, that read everything.")] = None,
    scoring: Annotated[
        Literal["minmax", "meanstd"] | None,
        _option(
            POLICY,
            "Quest: bound a page's logits, or estimate its mass.",
            show_default="minmax; meanstd with --loss-aware",
        ),
    ] = None,
    summary_dtype: Annotated[
        Literal["float8"] | None,
        _option(POLICY, "Quest: what page summaries are stored as.", show_default="as the KV cache"),
    ] = None,
    policy_option: Annotated[
        list[str] | None,
        _option(POLICY, "One that only this policy has, such as buffer=64 for rkv; repeatable.", metavar="NAME=VALUE"),
    ] = None,
    guardian: Annotated[
        bool, _option(STOP, "Stop when the output carries almost no new information.", show_default=True)
    ] = False,
    interval: Annotated[int | None, _option(STOP, "Tokens between two checks.", show_default="250")] = None,
    threshold: Annotated[float | None, _option(STOP, "LZ77 growth an interval must reach.", show_default="20")] = None,
    unit: Annotated[
        Literal["phrases", "bits"] | None, _option(STOP, "What the threshold counts.", show_default="phrases")
    ] = None,
    loss_aware: Annotated[
        bool | None, _option(STOP, "Weigh what sparse attention lost against the growth.", "--loss-aware")
    ] = None,
    action: Annotated[
        Literal["stop", "answer", "rescue"],
        _option(
            STOP, "End; close the thinking and answer; or read everything for one interval first.", show_default=True
        ),
    ] = "stop",
    answer_text: Annotated[
        str | None, _option(STOP, "What closes the thinking.", show_default="</think>, where the template has it")
    ] = None,
    answer_tokens: Annotated[int, _option(STOP, "The most tokens of an answer.", show_default=True, min=1)] = 256,
    max_new_tokens: Annotated[int, _option(GENERATION, "The most tokens to generate.", show_default=True, min=1)] = 256,
    ignore_eos: Annotated[bool, _option(GENERATION, "Go on after an end-of-sequence token.", "--ignore-eos")] = False,
    temperature: Annotated[float, _option(GENERATION, "0 is greedy.", show_default=True)] = 0.0,
    top_k: Annotated[int, _option(GENERATION, "Draw from the k likeliest tokens; 0 is all.", show_default=True)] = 0,
    top_p: Annotated[
        float, _option(GENERATION, "Draw from the likeliest tokens of this share.", show_default=True)
    ] = 1.0,
    seed: Annotated[
        int, _option(GENERATION, "Of the draws.", show_default=True, min=0, max=2**32 - 1, metavar="<int>")
    ] = 0,
    chat: Annotated[
        bool | None, _option(GENERATION, "Put the prompt into the chat template.", show_default="where there is one")
    ] = None,
    compare: Annotated[
        bool, _option(OUTPUT, "Also run dense, and both without the Guardian.", show_default=True)
    ] = True,
    as_json: Annotated[bool, _option(OUTPUT, "Print one JSON document and nothing else.", "--json")] = False,
    verbose: Annotated[bool, _option(OUTPUT, "Show the libraries' notices and warnings.", "--verbose")] = False,
) -> None:
    """Generate text with a policy and an early stop, and compare with the dense model.

    The run you ask for is streamed. Then dense, dense with Guardian and the policy without it run on the same prompt,
    and a table shows tokens, time to first token (TTFT), time between tokens (TBT), job completion time (JCT), peak KV
    bytes and the LZ77 ratio (phrases a token) of each.
    """
    from rich.console import Console
    from rich.text import Text

    from lil_ops.cli.display import RunView, legend, results_table
    from lil_ops.cli.report import document
    from lil_ops.policies import with_loss

    options = {name: value for name, value in context.params.items() if name not in ("prompt", "as_json", "verbose")}
    given = {name: value for name, value in options.items() if value is not None}
    policy_options = {name: given[name] for name in POLICY_OPTIONS if name in given}
    read = checks.read_policy_options(given.get("budget"), given.get("policy_option") or [])
    options["budget"] = read.get("budget")
    policy_options |= read
    loop_options = {name: options[name] for name in LOOP_OPTIONS} | ({"eos_token_id": ()} if ignore_eos else {})
    prompt = checks.read_prompt(prompt)
    early_stop = checks.make_guardian(guardian, {name: given[name] for name in GUARDIAN_OPTIONS if name in given})
    if early_stop and early_stop.needs_loss:
        policy_options = with_loss(policy, policy_options)
    checks.check_action(action, guardian, answer_text)
    checks.check_decoding(policy, policy_options, page_size, temperature, top_k, top_p)
    checks.check_device(device)

    runs = plan(policy, policy_options, early_stop, compare)
    chosen = runs[-1]

    console = Console(file=sys.stderr if as_json else sys.stdout)
    outcomes: dict[str, Outcome] = {}
    prompt_ids, tokenizer, interrupted = [], None, False
    try:
        with console.status(Text(f"loading {model}")), nullcontext() if verbose else session.quiet():
            network, tokenizer = session.load(model, dtype, device, threads)
            options["dtype"] = str(network.dtype).removeprefix("torch.")
            prompt_ids = session.encode(tokenizer, prompt, chat)
            decoder = Decoder(
                network, prompt_ids, loop_options, make_action(action, tokenizer, answer_text, answer_tokens)
            )
            decoder.warm_up(chosen)
        # The run that was asked for goes first: its text is what the user waits for.
        for run in (chosen, *runs[:-1]):
            text = Detokenizer(tokenizer) if run is chosen and not as_json else None
            with RunView(console, run.name, text) as view:
                outcomes[run.name] = decoder.decode(run, view.step)
            if interrupted := outcomes[run.name].interrupted:
                break
    except KeyboardInterrupt:
        interrupted = True

    rows = [outcomes[run.name] for run in runs if run.name in outcomes]
    if as_json:
        print(json.dumps(document(options, prompt, prompt_ids, rows, interrupted, tokenizer)))
    elif rows:
        console.print(results_table(rows), legend(chosen, options, len(prompt_ids)))
    if interrupted:
        raise typer.Exit(130)

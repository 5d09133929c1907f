"""lil-ops generate: one prompt, decoded with a policy and an early stop, and beside it the dense model."""

from __future__ import annotations

import json
import sys
from contextlib import nullcontext
from typing import Annotated, Literal

import typer

from lil_ops.cli.errors import UserError, user_errors
from lil_ops.cli.runs import Decoder, Outcome, Run, plan

POLICY, STOP, SAMPLING, MODEL, OUTPUT = "Policy", "Early stop", "Sampling", "Model and machine", "Output"


def option(help: str, panel: str, *names: str, **settings):
    return typer.Option(*names, help=help, rich_help_panel=panel, **{"show_default": False, **settings})


def generate(
    context: typer.Context,
    prompt: Annotated[str, typer.Argument(help="The prompt; - reads it from standard input.", show_default=False)],
    model: Annotated[str, option("GGUF file, model folder or Hugging Face id.", MODEL)],
    dtype: Annotated[
        Literal["float32", "bfloat16", "float16"] | None, option("Default: the checkpoint's; float32 for GGUF.", MODEL)
    ] = None,
    device: Annotated[str, option("cpu, cuda or cuda:N.", MODEL, show_default=True)] = "cpu",
    threads: Annotated[int | None, option("CPU threads. Default: torch's.", MODEL, min=1)] = None,
    page_size: Annotated[int, option("Tokens in a page: 8, 16, 32, 64 or 128.", MODEL, show_default=True)] = 16,
    policy: Annotated[str, option("What a step reads: full, sink or quest.", POLICY, show_default=True)] = "full",
    budget: Annotated[int | None, option("Tokens a KV head may read, all included.", POLICY)] = None,
    sink: Annotated[int | None, option("Tokens at the start that are always read.", POLICY)] = None,
    recent: Annotated[int | None, option("Tokens at the end that are always read.", POLICY)] = None,
    protect_prompt: Annotated[bool | None, option("Always read the whole prompt.", POLICY)] = None,
    dense_layers: Annotated[int | None, option("Layers, from the first, that read everything.", POLICY)] = None,
    guardian: Annotated[
        bool, option("Stop when the output carries no new information.", STOP, "--guardian/--no-guardian")
    ] = False,
) -> None: ...

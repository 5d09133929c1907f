"""The options of `lil-ops generate`, checked before the model is loaded. Each function raises `UserError`."""

from __future__ import annotations

import ast
import re
import sys
from typing import TYPE_CHECKING

from lil_ops.cli.errors import UserError, user_errors

if TYPE_CHECKING:
    from lil_ops import Guardian


def read_prompt(argument: str) -> str:
    """The prompt itself, or standard input for "-"."""
    try:
        prompt = sys.stdin.read() if argument == "-" else argument
        # Arguments, and some streams, carry bytes that are not UTF-8 as lone surrogates, which do not encode.
        prompt.encode()
    except UnicodeError as error:
        raise UserError("the prompt is not UTF-8 text") from error
    if not prompt.strip():
        raise UserError("the prompt is empty")
    return prompt


def make_guardian(wanted: bool, options: dict) -> Guardian | None:
    """The early stop with the options that were given: interval, threshold, unit."""
    from lil_ops import Guardian

    if not wanted and options:
        raise UserError(f"--{next(iter(options)).replace('_', '-')} needs --guardian")
    if options.get("unit") == "bits" and "threshold" not in options:
        raise UserError("--unit bits needs --threshold: the default is in phrases")
    with user_errors(ValueError):
        return Guardian(**options) if wanted else None


def read_policy_options(budget: str | None, further: list[str]) -> dict:
    """``--budget`` and each ``--policy-option NAME=VALUE`` as options of a policy."""
    options = {}
    if budget is not None:
        entries = [_value(entry) for entry in budget.split(",")]
        if not all(isinstance(entry, (int, float)) for entry in entries):
            raise UserError(f"--budget: expected a number of tokens, a share, or a list of these, got {budget!r}")
        options["budget"] = entries[0] if len(entries) == 1 else entries
    for one in further:
        name, equals, value = one.partition("=")
        if not (name and equals and value):
            raise UserError(f"--policy-option: expected NAME=VALUE, got {one!r}")
        options[name.replace("-", "_")] = _value(value)
    return options


def _value(text: str) -> object:
    """What the text means as a Python literal, or else the text."""
    try:
        return ast.literal_eval(text.strip())
    except (ValueError, SyntaxError):
        return text


def check_action(action: str, guardian: bool, answer_text: str | None) -> None:
    """Whether the action has a rule to follow, and the text an answer."""
    if action != "stop" and not guardian:
        raise UserError(f"--action {action} needs --guardian")
    if answer_text is not None and action != "answer":
        raise UserError("--answer-text needs --action answer")


def check_decoding(policy: str, policy_options: dict, page_size: int, temperature: float, top_k: int, top_p: float):
    """Whatever of the policy and the sampling can be checked without a model."""
    from lil_ops import policies
    from lil_ops.cache import PagedKVCache
    from lil_ops.sampling import check_sampling

    with user_errors(ValueError):
        check_sampling(temperature, top_k, top_p)
        # The smallest cache knows which page sizes there are and which budgets fit them. What a share or a list comes
        # to is for the model to say.
        cache = PagedKVCache(num_layers=1, kv_heads=1, head_dim=1, batch=1, max_tokens=1, page_size=page_size)
        made = policies.get(policy, **policy_options)
        if not isinstance(policy_options.get("budget"), (float, list)):
            made.begin(cache, [])


def check_device(name: str) -> None:
    """Whether models can run on the device of this name."""
    import torch

    from lil_ops import _library

    match = re.fullmatch(r"cpu|cuda(?::(\d+))?", name)
    if not match:
        raise UserError(f"device: expected cpu, cuda or cuda:N, got {name!r}")
    if name == "cpu":
        return
    if not _library.cuda_loaded:
        raise UserError(f"device: got {name!r}, but lil_ops has no CUDA library loaded here (see lil-ops info)")
    if int(match[1] or 0) >= torch.cuda.device_count():
        raise UserError(f"device: got {name!r}, but torch finds {torch.cuda.device_count()} CUDA devices")

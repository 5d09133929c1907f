"""Loading: a model, its tokenizer and the prompt's tokens, without the chatter of the libraries that do it."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

from lil_ops.cli.errors import UserError, user_errors


def check_device(name: str) -> None:
    """Raise `UserError` unless models can run on the device of this name."""
    import torch

    from lil_ops import _library

    with user_errors(RuntimeError):
        device = torch.device(name)
    if device.type not in ("cpu", "cuda"):
        raise UserError(f"device: expected cpu or cuda, got {name!r}")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UserError(f"device: {name!r} was asked for, but torch finds no CUDA device")
    if device.type == "cuda" and not _library.cuda_loaded:
        raise UserError(f"device: {name!r} was asked for, but lil_ops was built without CUDA")


def load(name: str, dtype: str | None, device: str):
    """``(model, tokenizer)``. Raises `UserError` for whatever keeps it from loading."""
    import torch

    import lil_ops

    # Exception: files of three formats are read by five libraries, and each raises its own kinds.
    try:
        return lil_ops.load_model(name, dtype=getattr(torch, dtype) if dtype else None, device=device)
    except Exception as error:
        # Further lines hold lists of model types, or advice for callers of from_pretrained.
        reason = str(error).strip().partition("\n")[0]
        raise UserError(f"cannot load the model: {reason or type(error).__name__}") from error


def encode(tokenizer, prompt: str, chat: bool | None) -> list[int]:
    """The prompt's ids, as a user's turn in the tokenizer's chat template where it has one (None) or must (True)."""
    if chat and not tokenizer.chat_template:
        raise UserError("--chat: the model's tokenizer has no chat template")
    if chat is False or not tokenizer.chat_template:
        return tokenizer(prompt).input_ids
    turns = [{"role": "user", "content": prompt}]
    return tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_dict=False)


@contextmanager
def quiet() -> Iterator[None]:
    """In this block, libraries keep warnings, notices and progress bars to themselves."""
    from transformers.utils import logging as hf_logging

    bars = hf_logging.is_progress_bar_enabled()
    hf_logging.disable_progress_bar()
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(logging.NOTSET)
        if bars:
            hf_logging.enable_progress_bar()

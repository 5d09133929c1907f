"""Loading: a model, its tokenizer and the prompt's tokens, without the chatter of the libraries that do it."""

from __future__ import annotations

import io
import logging
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr

from lil_ops.cli.errors import UserError


def load(name: str, dtype: str | None, device: str, threads: int | None):
    """``(model, tokenizer)``, and torch set to that many threads. `UserError` for whatever keeps it from loading."""
    import torch

    import lil_ops

    if threads:
        torch.set_num_threads(threads)

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
    """In this block, libraries keep warnings, notices and progress bars to themselves; errors still come out."""
    logging.disable(logging.WARNING)
    try:
        # Some progress bars have no switch but the stream they write to.
        with redirect_stderr(io.StringIO()):
            yield
    finally:
        logging.disable(logging.NOTSET)

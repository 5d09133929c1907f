"""Errors of the user, as opposed to ours: `main` prints them as one line, without a traceback."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


class UserError(Exception):
    """Something the user can put right. The message says what was expected and what was found."""


@contextmanager
def user_errors(*kinds: type[Exception]) -> Iterator[None]:
    """In this block, exceptions of these kinds are the user's."""
    try:
        yield
    except kinds as error:
        raise UserError(str(error)) from error

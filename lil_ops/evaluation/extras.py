"""Optional dependencies: each is imported where it is used, and its absence names the extra that brings it."""

from __future__ import annotations

import importlib
from types import ModuleType


class MissingExtraError(ImportError):
    """A library of an extra is not installed."""


def require(module: str, extra: str) -> ModuleType:
    """Import ``module``, or say which extra to install."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise MissingExtraError(f"this needs {error.name}: pip install lil-ops[{extra}]") from error

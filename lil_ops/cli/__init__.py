"""The command line: lil-ops."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import NoReturn


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Run ``lil-ops`` and exit: 0 when done, 2 for an error of the user (one line on stderr), 130 when interrupted."""
    try:
        from lil_ops.cli.app import USER_ERRORS, app
    except ModuleNotFoundError as error:
        _fail(f"the command line needs {error.name}: pip install lil-ops[cli]")
    # Generated text may hold what a terminal's encoding does not; that must not end a run.
    sys.stdout.reconfigure(errors="replace")
    arguments = sys.argv[1:] if arguments is None else arguments
    try:
        sys.exit(app(arguments or ["--help"], prog_name="lil-ops", standalone_mode=False))
    except USER_ERRORS as error:
        _fail(getattr(error, "format_message", error.__str__)())


def _fail(message: str) -> NoReturn:
    print("lil-ops: error:", " ".join(message.split()), file=sys.stderr)
    sys.exit(2)

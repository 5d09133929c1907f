"""The application: its commands, and which exceptions are errors of the user."""

from __future__ import annotations

import typer

from lil_ops.cli.errors import UserError
from lil_ops.cli.eval_report import report
from lil_ops.cli.evaluate import evaluate
from lil_ops.cli.generate import generate
from lil_ops.cli.info import info
from lil_ops.cli.policies import policies
from lil_ops.cli.replay import replay

# Typer's usage errors have a public name only through this subclass of theirs.
USER_ERRORS = (UserError, typer.BadParameter.__base__)

app = typer.Typer(
    help="Sparse attention over a paged KV cache and an early stop, for cheap long decoding.",
    # Markdown: paragraphs of docstrings are filled to the width there is.
    rich_markup_mode="markdown",
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.command()(generate)
app.command()(info)
app.command()(policies)
app.command("eval")(evaluate)
app.command()(replay)
app.command()(report)

"""How the commands declare their options."""

from __future__ import annotations

import typer


def option(panel: str, help: str, *names: str, show_default: bool | str = False, **limits):
    """An option in a panel of the help."""
    return typer.Option(*names, help=help, rich_help_panel=panel, show_default=show_default, **limits)


def listed(text: str, name: str) -> list[str]:
    """The parts of a comma-separated list, each once."""
    parts = [part.strip() for part in text.split(",")]
    if not all(parts):
        raise typer.BadParameter(f"--{name}: expected words with commas between them, got {text!r}")
    return list(dict.fromkeys(parts))

"""lil-ops info: what was built and what this machine offers."""

from __future__ import annotations

import json
from typing import Annotated

import typer

# Key of `lil_ops.build_info` -> its label. Keys without one are shown under their own name.
LABELS = {
    "torch_cuda": "torch's CUDA",
    "cxx_compiler": "C++ compiler",
    "cuda_version": "nvcc",
    "cuda_archs": "CUDA architectures",
    "cuda_library": "CUDA library",
    "isas": "CPU kernels",
    "isa": "CPU kernels in use",
}


def info(
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead.")] = False,
) -> None:
    """Show versions, compilers, the CUDA library, architectures, instruction sets and devices."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from lil_ops import build_info

    facts = build_info()
    if as_json:
        print(json.dumps(facts, indent=2))
        return
    table = Table.grid(padding=(0, 2))
    table.add_column(style="bold")
    for key, value in facts.items():
        shown = ", ".join(map(str, value)) if isinstance(value, list) else str(value or "")
        table.add_row(LABELS.get(key, key), Text(shown or "none"))
    Console().print(table)

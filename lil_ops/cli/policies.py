"""lil-ops policies: what a step may read, one line a policy."""

from __future__ import annotations


def policies() -> None:
    """List the policies: rule, memory, source and options."""
    from rich.console import Console
    from rich.table import Table

    from lil_ops.policies import POLICIES, options_of

    table = Table("policy", "a step reads", "memory", "source", "options", box=None, header_style="bold")
    for name, policy in POLICIES.items():
        table.add_row(name, policy.rule, policy.memory, policy.source, ", ".join(options_of(policy)) or "none")
    Console().print(table)

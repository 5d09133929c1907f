"""Policies: which cached tokens a decode step reads. One file each; `get` makes one by name."""

from __future__ import annotations

import difflib
import inspect

from lil_ops.policies.base import Chunk, Policy, Selection
from lil_ops.policies.full import Full
from lil_ops.policies.h2o import H2O
from lil_ops.policies.infllm import InfLLM
from lil_ops.policies.lessismore import LessIsMore
from lil_ops.policies.quest import Quest
from lil_ops.policies.raas import RaaS
from lil_ops.policies.rkv import RKV
from lil_ops.policies.sink import Sink
from lil_ops.policies.slots import TokenSlots
from lil_ops.policies.snapkv import SnapKV
from lil_ops.policies.tova import TOVA

POLICIES: dict[str, type[Policy]] = {
    policy.name: policy for policy in (Full, Sink, H2O, Quest, InfLLM, RaaS, SnapKV, TOVA, RKV, LessIsMore)
}


def get(name: str | Policy, **options) -> Policy:
    """The policy called ``name`` with ``options`` (see `Policy`); a Policy is returned as it is.

    Raises ValueError for an unknown name (the message lists the names and the nearest) or an option it does not take.
    """
    if isinstance(name, Policy):
        if options:
            raise ValueError(f"policy {name.name}: options {sorted(options)} were given beside a policy object")
        return name
    if not isinstance(name, str):
        raise ValueError(f"policy: expected a name or a Policy object, got {name!r}")
    if name not in POLICIES:
        nearest = difflib.get_close_matches(name, POLICIES, n=1)
        hint = f"; did you mean {nearest[0]!r}?" if nearest else ""
        raise ValueError(f"unknown policy {name!r}: expected one of {', '.join(POLICIES)}{hint}")
    taken = options_of(POLICIES[name])
    for option in options:
        if option not in taken:
            expected = f"one of {', '.join(taken)}" if taken else "none"
            raise ValueError(f"policy {name}: unknown option {option!r}: expected {expected}")
    return POLICIES[name](**options)


def with_loss(name: str | Policy, options: dict) -> dict:
    """``options`` and, for what they leave open, the defaults of the policy called ``name`` under a rule that reads the
    loss. Those of a Policy are settled, and an unknown name has none."""
    return POLICIES[name].loss_options | options if isinstance(name, str) and name in POLICIES else options


def options_of(policy: type[Policy]) -> list[str]:
    """The options it takes: its own, and where it passes others on, those of `Policy`."""
    own = inspect.signature(policy).parameters.values()
    named = [parameter.name for parameter in own if parameter.kind is not parameter.VAR_KEYWORD]
    passed_on = inspect.signature(Policy).parameters if len(named) < len(own) else ()
    return list(dict.fromkeys([*passed_on, *named]))


__all__ = [
    "H2O",
    "POLICIES",
    "RKV",
    "TOVA",
    "Chunk",
    "Full",
    "InfLLM",
    "LessIsMore",
    "Policy",
    "Quest",
    "RaaS",
    "Selection",
    "Sink",
    "SnapKV",
    "TokenSlots",
    "get",
    "options_of",
    "with_loss",
]

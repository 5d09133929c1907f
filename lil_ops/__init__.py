"""lil_ops: sparse attention over a paged KV cache and an early stop on the device, as PyTorch custom operators.

The core needs torch and numpy only. `generate`, `DecodeLoop`, `LilCache` and `load_model` work on Hugging Face models
and import transformers when they are first used (``pip install lil-ops[hf]``).
"""

__version__ = "0.1.0"

import importlib

from lil_ops._library import build_info, check_errors
from lil_ops.actions import Answer, Rescue
from lil_ops.baselines import Repetition, TokenBudget
from lil_ops.guardian import Guardian
from lil_ops.ops import (
    append_kv,
    compact_kv,
    decode_linear,
    evict_pages,
    fold_mass,
    guardian_check,
    information_loss,
    key_redundancy,
    lz77_append,
    lz77_state,
    represent_page,
    score_pages,
    select_pages,
    sparse_decode,
    sparse_decode_step,
)
from lil_ops.stopping import StopReason

# Names whose modules need transformers: imported on first use.
_LAZY = {
    "StopRuleCriteria": "lil_ops.integrations.criteria",
    "DecodeLoop": "lil_ops.decode",
    "Engine": "lil_ops.engine",
    "Request": "lil_ops.engine",
    "LilCache": "lil_ops.integrations.transformers",
    "generate": "lil_ops.decode",
    "load_model": "lil_ops.models",
}

__all__ = [
    "Answer",
    "DecodeLoop",
    "Engine",
    "Guardian",
    "LilCache",
    "Repetition",
    "Request",
    "Rescue",
    "StopReason",
    "StopRuleCriteria",
    "TokenBudget",
    "append_kv",
    "build_info",
    "check_errors",
    "compact_kv",
    "decode_linear",
    "evict_pages",
    "fold_mass",
    "generate",
    "guardian_check",
    "information_loss",
    "key_redundancy",
    "load_model",
    "lz77_append",
    "lz77_state",
    "represent_page",
    "score_pages",
    "select_pages",
    "sparse_decode",
    "sparse_decode_step",
]


def __getattr__(name: str):
    if name not in _LAZY:
        raise AttributeError(f"module 'lil_ops' has no attribute {name!r}")
    try:
        module = importlib.import_module(_LAZY[name])
    except ModuleNotFoundError as error:
        raise ImportError(f"lil_ops.{name} needs {error.name.partition('.')[0]}: pip install lil-ops[hf]") from error
    return getattr(module, name)

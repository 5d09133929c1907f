"""The specification: every operator in plain PyTorch, float64 where it computes, with no tricks.

Each module defines the operator of its name (`lz77_append`'s result is `lz77_sizes` of all tokens so far, and
`sparse_decode`'s optional outputs are `attention_mass`). Operators that write into their arguments are pure functions
here and return the new values.
"""

from lil_ops.reference.append_kv import append_kv
from lil_ops.reference.compact_kv import compact_kv
from lil_ops.reference.decode_linear import decode_linear
from lil_ops.reference.evict_pages import evict_pages
from lil_ops.reference.fold_mass import fold_mass
from lil_ops.reference.guardian_check import guardian_check
from lil_ops.reference.information_loss import information_loss
from lil_ops.reference.key_redundancy import key_redundancy
from lil_ops.reference.lz77_append import lz77_sizes
from lil_ops.reference.represent_page import represent_page
from lil_ops.reference.score_pages import score_pages
from lil_ops.reference.select_pages import select_pages
from lil_ops.reference.sparse_decode import attention_mass, sparse_decode
from lil_ops.reference.sparse_decode_step import sparse_decode_step

__all__ = [
    "append_kv",
    "attention_mass",
    "compact_kv",
    "decode_linear",
    "evict_pages",
    "fold_mass",
    "guardian_check",
    "information_loss",
    "key_redundancy",
    "lz77_sizes",
    "represent_page",
    "score_pages",
    "select_pages",
    "sparse_decode",
    "sparse_decode_step",
]

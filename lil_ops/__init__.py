"""lil_ops: sparse attention over a paged KV cache and an early stop on the device, as PyTorch custom operators."""

__version__ = "0.1.0"

from lil_ops._library import build_info
from lil_ops.ops import (
    append_kv,
    score_pages,
    select_pages,
    sparse_decode,
)

__all__ = ["append_kv", "build_info", "score_pages", "select_pages", "sparse_decode"]

"""Definition of lz77_append's sizes."""

from __future__ import annotations

from collections.abc import Sequence


def _ceil_log2(n: int) -> int:
    return (n - 1).bit_length()


def _floor_log2(n: int) -> int:
    return n.bit_length() - 1


def lz77_sizes(tokens: Sequence[int], vocab_size: int) -> tuple[list[int], list[int]]:
    """The LZ77 size after each token: ``(phrases, bits)``, lists as long as ``tokens``. See `lil_ops.lz77_append`.

    A phrase goes on while all of it occurs earlier, from a start before its own (the two may overlap), and ends with
    the first token that breaks this. The phrase still going on counts as one.
    """
    tokens = list(tokens)
    phrases, bits = [], []
    start = phrases_before = bits_before = 0
    for end in range(1, len(tokens) + 1):
        phrase = tokens[start:end]
        # Which earlier position or none; the length as an Elias gamma code; the last token.
        phrase_bits = _ceil_log2(start + 1) + 2 * _floor_log2(len(phrase)) + 1 + _ceil_log2(vocab_size)
        phrases.append(phrases_before + 1)
        bits.append(bits_before + phrase_bits)
        if not any(tokens[earlier : earlier + len(phrase)] == phrase for earlier in range(start)):
            start, phrases_before, bits_before = end, phrases[-1], bits[-1]
    return phrases, bits

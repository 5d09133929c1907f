"""Text of a token stream."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

INCOMPLETE = "\ufffd"


class Detokenizer:
    """Turns tokens, one by one, into pieces of text that add up to the decoded whole. Special tokens have no text."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        self._tokenizer = tokenizer
        self._special = {id for id, token in tokenizer.added_tokens_decoder.items() if token.special}
        # The tokens of the last piece, and after them those whose text is still to come.
        self._context: list[int] = []
        self._pending: list[int] = []

    def push(self, token: int) -> str:
        """The text that this token completes: "" while it ends inside a character."""
        if token in self._special:
            return ""
        self._pending.append(token)
        piece = self.rest()
        if not piece or piece.endswith(INCOMPLETE):
            return ""
        self._context, self._pending = self._pending, []
        return piece

    def rest(self) -> str:
        """The text of the tokens that have not come out yet."""
        # Decoded behind the last piece: at the start of a text, many tokenizers drop a leading space.
        return self._decode(self._context + self._pending)[len(self._decode(self._context)) :]

    def _decode(self, tokens: list[int]) -> str:
        return self._tokenizer.decode(tokens, clean_up_tokenization_spaces=False)

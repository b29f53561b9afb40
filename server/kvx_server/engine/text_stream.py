"""Turns tokens into text as they come, never showing half of a character.

A character may take several tokens, and what a token reads as may depend on the one before it. So
text is held back while it ends in a replacement character, and is always decoded together with the
tokens shown last. Source: `decode_token` of Hugging Face text-generation-inference.
"""

from __future__ import annotations

from kvx_server.engine.tokenizer import Tokenizer

_INCOMPLETE = "\ufffd"


class TextStream:
    """The text of one sequence, piece by piece."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        """Start with no tokens."""
        self._tokenizer = tokenizer
        # The tokens shown last, which give context, and those held back.
        self._shown: list[int] = []
        self._held: list[int] = []

    def push(self, token: int) -> str:
        """Add a token and return the text that is certain now, maybe none."""
        self._held.append(token)
        piece = self._piece()
        if not piece or piece.endswith(_INCOMPLETE):
            return ""
        self._show()
        return piece

    def finish(self) -> str:
        """Return the text that was held back; broken characters are replaced."""
        piece = self._piece()
        self._show()
        return piece

    def _piece(self) -> str:
        known = self._tokenizer.decode(self._shown)
        return self._tokenizer.decode(self._shown + self._held)[len(known) :]

    def _show(self) -> None:
        self._shown = self._held
        self._held = []

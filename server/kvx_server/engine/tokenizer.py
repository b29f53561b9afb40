"""Text to tokens and back: bytes themselves, or any Hugging Face `tokenizer.json`.

A byte-level vocabulary without merges, whose token ids are the bytes 0 to 255, needs nothing but
this file; everything else goes through the optional `tokenizers` package.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from kvx_server.engine.errors import ModelFormatError

if TYPE_CHECKING:
    import tokenizers

_NUM_BYTES = 256


class Tokenizer(Protocol):
    """What the engine's callers need of a tokenizer."""

    def encode(self, text: str) -> list[int]:
        """Return the tokens of a text, without any token that marks its begin or end."""

    def decode(self, tokens: Sequence[int]) -> str:
        """Return the text of tokens; special tokens have none, broken UTF-8 is replaced."""


class ByteTokenizer:
    """One token for each byte of the UTF-8 text."""

    def encode(self, text: str) -> list[int]:
        """Return the bytes of a text."""
        return list(text.encode())

    def decode(self, tokens: Sequence[int]) -> str:
        """Return the text of bytes; tokens above 255 have no text."""
        return bytes(token for token in tokens if 0 <= token < _NUM_BYTES).decode(errors="replace")


class PackagedTokenizer:
    """A tokenizer of the `tokenizers` package."""

    def __init__(self, tokenizer: tokenizers.Tokenizer) -> None:
        """Wrap a loaded tokenizer."""
        self._tokenizer = tokenizer

    def encode(self, text: str) -> list[int]:
        """Return the tokens of a text."""
        return list(self._tokenizer.encode(text, add_special_tokens=False).ids)

    def decode(self, tokens: Sequence[int]) -> str:
        """Return the text of tokens."""
        return str(self._tokenizer.decode(list(tokens), skip_special_tokens=True))


def load_tokenizer(folder: Path) -> Tokenizer:
    """Return the tokenizer of a model folder.

    Raises:
        ModelFormatError: `tokenizer.json` is missing or damaged, or needs the `tokenizers` package,
            which is not installed.
    """
    path = folder / "tokenizer.json"
    try:
        text = path.read_text(encoding="utf-8")
        values = json.loads(text)
    except (OSError, ValueError) as error:
        message = f"{path} cannot be read as JSON: {error}"
        raise ModelFormatError(message) from error
    if is_byte_level(values):
        return ByteTokenizer()
    try:
        import tokenizers  # noqa: PLC0415 - optional
    except ImportError as error:
        message = f"{path} needs the tokenizers package: pip install tokenizers"
        raise ModelFormatError(message) from error
    try:
        return PackagedTokenizer(tokenizers.Tokenizer.from_str(text))
    except Exception as error:  # The package raises bare Exception for a file it rejects.
        message = f"{path} is rejected by the tokenizers package: {error}"
        raise ModelFormatError(message) from error


def is_byte_level(values: object) -> bool:
    """Return whether a parsed `tokenizer.json` maps every byte to the token of the same number."""
    model = values.get("model") if isinstance(values, Mapping) else None
    if not isinstance(model, Mapping) or model.get("type") != "BPE" or model.get("merges"):
        return False
    return model.get("vocab") == {letter: byte for byte, letter in enumerate(byte_letters())}


def byte_letters() -> list[str]:
    """Return the letter that stands for each byte in byte-level vocabularies.

    Source: `bytes_to_unicode` of GPT-2: printable bytes stand for themselves, others are shifted.
    """
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    letters = []
    shifted = _NUM_BYTES
    for byte in range(_NUM_BYTES):
        letters.append(chr(byte if byte in printable else shifted))
        shifted += byte not in printable
    return letters

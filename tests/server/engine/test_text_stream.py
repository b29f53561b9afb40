"""Pieces of text add up to the text, and none of them is half a character."""

from __future__ import annotations

from kvx_server.engine.text_stream import TextStream
from kvx_server.engine.tokenizer import ByteTokenizer


def _pieces(tokens: list[int]) -> list[str]:
    stream = TextStream(ByteTokenizer())
    return [*(stream.push(token) for token in tokens), stream.finish()]


def test_characters_come_whole() -> None:
    assert _pieces(list("aé🙂b".encode())) == ["a", "", "é", "", "", "", "🙂", "b", ""]


def test_special_tokens_have_no_text() -> None:
    assert _pieces([256, 97, 257, 98]) == ["", "a", "", "b", ""]


def test_broken_characters_are_replaced_at_the_end() -> None:
    assert _pieces([97, 0xE2, 0x86]) == ["a", "", "", "\ufffd"]
    assert "".join(_pieces([0xFF, 97, 98])) == "\ufffdab"


def test_pieces_add_up() -> None:
    text = "naïve → 终 🙂\n" * 20
    assert "".join(_pieces(list(text.encode()))) == text

"""Text survives a round trip, and a tokenizer that cannot be loaded says why."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from kvx_server.engine import tiny_llama_folder
from kvx_server.engine.errors import ModelFormatError
from kvx_server.engine.tokenizer import (
    ByteTokenizer,
    PackagedTokenizer,
    is_byte_level,
    load_tokenizer,
)

_TEXTS = ["", "def f(x):\n\treturn x", "naïve → 终 🙂", "\x00\x7f\r\n", "<|begin|>"]


def _tiny_tokenizer() -> dict[str, object]:
    text = (tiny_llama_folder() / "tokenizer.json").read_text(encoding="utf-8")
    values: dict[str, object] = json.loads(text)
    return values


@pytest.mark.parametrize("text", _TEXTS)
def test_bytes_round_trip(text: str) -> None:
    tokenizer = load_tokenizer(tiny_llama_folder())
    assert isinstance(tokenizer, ByteTokenizer)
    assert tokenizer.encode(text) == list(text.encode())
    assert tokenizer.decode([256, *tokenizer.encode(text), 257]) == text


def test_broken_utf8_is_replaced() -> None:
    assert ByteTokenizer().decode([0xE2, 0x86, 65]) == "\ufffdA"


def test_other_vocabularies_use_the_package(tmp_path: Path) -> None:
    pytest.importorskip("tokenizers", reason="tokenizers is not installed: pip install tokenizers")
    values = _tiny_tokenizer()
    model = values["model"]
    assert isinstance(model, dict)
    vocabulary = model["vocab"]
    model["merges"] = [["t", "h"]]
    model["vocab"] = {**vocabulary, "th": 258}
    assert not is_byte_level(values)
    (tmp_path / "tokenizer.json").write_text(json.dumps(values), encoding="utf-8")
    tokenizer = load_tokenizer(tmp_path)
    assert isinstance(tokenizer, PackagedTokenizer)
    assert tokenizer.encode("the") == [258, ord("e")]
    for text in _TEXTS[:-1]:
        assert tokenizer.decode(tokenizer.encode(text)) == text


@pytest.mark.parametrize("text", [None, "{", "[]", '{"model": {"type": "Nonsense"}}'])
def test_refuses(tmp_path: Path, text: str | None) -> None:
    if text is not None:
        (tmp_path / "tokenizer.json").write_text(text, encoding="utf-8")
    with pytest.raises(ModelFormatError, match=r"tokenizer\.json"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("model", [None, {"type": "WordPiece"}, {"type": "BPE", "vocab": {"a": 0}}])
def test_is_byte_level_refuses(model: object) -> None:
    assert not is_byte_level({"model": model})
    assert is_byte_level(_tiny_tokenizer())

"""The model that comes with the engine fits its budget and has learned what it was shown."""

from __future__ import annotations

import re
from collections.abc import Callable

import numpy as np
import pytest

from kvx_server.engine import Engine, Sampler, Sampling, tiny_llama_folder
from kvx_server.engine.corpus import documents

_MODEL_BYTES_MAX = 4_000_000
_SAMPLING = Sampling(temperature=0.7, top_p=0.95, seed=0)
_WORD = re.compile(r"[A-Za-z]+")
_BLOCK_IDS = list(range(64))
_NEW_TOKENS = 250


@pytest.fixture(scope="module")
def words() -> frozenset[str]:
    """Return every word of the documentation."""
    text = " ".join(document.text for document in documents())
    return frozenset(word.lower() for word in _WORD.findall(text))


def _share_of_words(text: str, words: frozenset[str]) -> float:
    found = _WORD.findall(text)
    return sum(word.lower() in words for word in found) / len(found)


def _continuation(engine: Engine, prompt: list[int], num_cached_tokens: int) -> str:
    sampler = Sampler(_SAMPLING)
    logits = engine.prefill(prompt, num_cached_tokens, _BLOCK_IDS)
    tokens: list[int] = []
    for position in range(len(prompt), len(prompt) + _NEW_TOKENS):
        tokens.append(sampler.next_token(logits))
        logits = engine.decode(tokens[-1], position, _BLOCK_IDS)
    return engine.tokenizer.decode(tokens)


def test_fits_its_budget() -> None:
    folder = tiny_llama_folder()
    assert (folder / "model.safetensors").stat().st_size <= _MODEL_BYTES_MAX
    assert "final step" in (folder / "training_log.txt").read_text(encoding="utf-8")


@pytest.mark.parametrize("prompt_tokens", [500, 3800])
def test_writes_words_unless_its_cache_is_damaged(
    load_engine: Callable[..., Engine],
    text_tokens: list[int],
    words: frozenset[str],
    prompt_tokens: int,
) -> None:
    engine = load_engine(num_blocks=len(_BLOCK_IDS), block_tokens=64)
    prompt = text_tokens[:prompt_tokens]
    healthy = _share_of_words(_continuation(engine, prompt, 0), words)
    num_cached_blocks = prompt_tokens // 64
    np.random.default_rng(0).shuffle(engine.cache.blocks[:num_cached_blocks].reshape(-1))
    damaged = _share_of_words(_continuation(engine, prompt, num_cached_blocks * 64), words)
    assert healthy > 0.85
    assert damaged < 0.6

"""Engines and text for the tests of the reference engine."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from kvx_server.engine import Engine, set_blas_threads, tiny_llama_folder
from kvx_server.engine.corpus import topic_documents


@pytest.fixture(scope="session", autouse=True)
def one_blas_thread() -> Iterator[None]:
    """Keep the tests fast on busy machines, and give back the threads afterwards."""
    before = set_blas_threads(1)
    yield
    if before is not None:
        set_blas_threads(before)


@pytest.fixture
def engine() -> Engine:
    """Return the tiny model with room for 1,024 tokens in blocks of 16."""
    return Engine.load(tiny_llama_folder(), num_blocks=64, block_tokens=16)


@pytest.fixture(scope="session")
def text_tokens() -> list[int]:
    """Return tokens of Python's language reference."""
    documents = topic_documents()
    if not documents:
        pytest.skip("this Python was installed without pydoc_data.topics")
    return list("".join(document.text for document in documents[10:20]).encode()[:20_000])


@pytest.fixture
def load_engine() -> Callable[..., Engine]:
    """Return a function that loads the tiny model with other blocks."""

    def load(**arguments: int | str) -> Engine:
        return Engine.load(tiny_llama_folder(), **arguments)

    return load

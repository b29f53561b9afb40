"""Agents that find and leave nothing in the user's own runtime directory."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.transfer.agents.pairs import Pair, open_pair


@pytest.fixture(autouse=True, scope="package")
def runtime_directory(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Keep socket files apart; processes that are spawned inherit it."""
    with pytest.MonkeyPatch.context() as patch:
        path = tmp_path_factory.mktemp("run")
        patch.setenv("XDG_RUNTIME_DIR", str(path))
        yield path
        left = list((path / "kvx").glob("*.sock")) if (path / "kvx").exists() else []
        # Whoever was killed leaves its own behind; the next agent to come removes it.
        assert len(left) <= 20


@pytest.fixture
def pair() -> Iterator[Pair]:
    with open_pair() as opened:
        yield opened

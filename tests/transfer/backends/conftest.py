"""What tests of backends have in common."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.transfer.backends.nixl_scene import Scene, open_scene


@pytest.fixture
def scene() -> Iterator[Scene]:
    """Two NIXL endpoints that are connected."""
    with open_scene() as opened:
        yield opened

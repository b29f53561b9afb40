"""Every backend of kvx holds to what `kvx.transfer.conformance` demands."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from kvx.transfer import conformance


@pytest.fixture(scope="module", params=["local", "shm", "tcp"])
def rig(request: pytest.FixtureRequest) -> Iterator[conformance.Rig]:
    with conformance.rig_of(request.param) as opened:
        yield opened


# The last one kills the owner.
@pytest.mark.parametrize("check", conformance.CHECKS, ids=lambda check: check.__name__)
def test_conformance(rig: conformance.Rig, check: conformance.Check) -> None:
    if check is not conformance.ends_when_the_owner_dies:
        rig.ask("fill", 1)
    check(rig)

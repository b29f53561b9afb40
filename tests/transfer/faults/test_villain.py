"""A peer that knows the key and abuses it gains nothing, and costs no more than its deadline."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

import kvx
from tests.sim.stalls import LATE_S
from tests.transfer.faults import tricks
from tests.transfer.faults.scene import Scene, open_scene
from tests.transfer.faults.tricks import Trick
from tests.transfer.faults.victim import CANARY


# Over unix sockets they are told by the long form of the matrix.
@pytest.fixture(params=["tcp", pytest.param("unix", marks=pytest.mark.slow)])
def scene(request: pytest.FixtureRequest) -> Iterator[Scene]:
    verb = "read" if "read" in request.node.name else "write"
    opened = open_scene(verb, is_unix=request.param == "unix")
    yield opened
    opened.close()


@pytest.mark.parametrize("trick", tricks.READS, ids=lambda trick: trick.name)
def test_answers_to_a_read(scene: Scene, trick: Trick) -> None:
    outcome, over_s = scene.play(trick, "read")
    assert outcome in trick.errors
    assert over_s < LATE_S + 0.1
    found = scene.target
    assert (found[scene.arrived] == tricks.CONTENT[scene.arrived]).all(), "wrong bytes are counted"
    assert scene.transfer.wait_quiesced(5.0)
    scene.target[:] = CANARY
    is_cut_off = scene.villain.socket.is_closed_by_peer(0.2 if not trick.is_cut_off else 5.0)
    if trick.name != "the end of the connection":
        assert is_cut_off == trick.is_cut_off
    assert (scene.blocks == CANARY).all(), "written outside of its blocks, or after its end"
    assert scene.agent.stats()["running"] == 0


@pytest.mark.parametrize("trick", tricks.WRITES, ids=lambda trick: trick.name)
def test_answers_to_a_write(scene: Scene, trick: Trick) -> None:
    outcome, over_s = scene.play(trick, "write")
    assert outcome in trick.errors
    assert over_s < LATE_S + 0.1
    if trick.name == "a full socket":
        assert scene.transfer.outcome is kvx.LinkOutcome.QUARANTINED
    assert (scene.blocks == CANARY).all(), "a write has changed its source"
    if trick.is_cut_off and trick.name != "the end of the connection":
        assert scene.villain.socket.is_closed_by_peer()

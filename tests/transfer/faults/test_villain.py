"""A peer that knows the key and abuses it gains nothing, and costs no more than its deadline."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator

import numpy as np
import pytest

import kvx
from kvx.errors import KvxError
from tests.transfer.faults import tricks
from tests.transfer.faults.frames import Type
from tests.transfer.faults.trial import LATE_S_MAX
from tests.transfer.faults.tricks import BLOCKS, Trick
from tests.transfer.faults.victim import BLOCK_BYTES, CANARY, KEY
from tests.transfer.faults.villain import Villain

CONFIG = {"backends": ["tcp"], "gossip": False, "ping_s": 5.0, "suspect_after_s": 6.0}
# What surrounds the blocks that are read into.
_MARGIN = 2
_ALL = slice(_MARGIN, _MARGIN + BLOCKS)


class Scene:
    """An agent, and a villain that it has connected with."""

    def __init__(self, *, is_unix: bool, block_bytes: int) -> None:
        self.block_bytes = block_bytes
        self.villain = Villain(is_unix=is_unix)
        self.agent = kvx.Agent("honest", key=KEY, config=CONFIG)
        self.blocks = np.full((BLOCKS + 2 * _MARGIN, block_bytes), CANARY, np.uint8)
        self.registration = self.agent.register(self.blocks)
        admitted = threading.Thread(target=self.villain.admit, daemon=True)
        admitted.start()
        self.peer = self.agent.connect(self.villain.address, 10.0)
        admitted.join(10.0)
        self.local = self.registration.blocks(np.arange(_MARGIN, _MARGIN + BLOCKS))

    def play(self, trick: Trick, verb: str) -> tuple[str, float]:
        """Ask the villain for something; returns how that ended, and how late."""
        is_read = verb == "read"
        link = self.villain.socket

        def answer() -> None:
            asked = link.take_only(Type.READ if is_read else Type.WRITE)
            if asked is not None:
                try:
                    trick.answer(link, asked)
                except OSError:
                    return  # it was cut off while it spoke

        actor = threading.Thread(target=answer, daemon=True)
        actor.start()
        token = self.villain.token(
            BLOCKS, self.block_bytes, tricks.SUMS if trick.has_checksums else None
        )
        began = time.monotonic()
        transfer = getattr(self.agent, verb)(
            self.local, self.peer.blocks(lease=token), deadline_s=tricks.DEADLINE_S
        )
        outcome = "done"
        try:
            transfer.wait()
        except KvxError as error:
            outcome = type(error).__name__
        over_s = time.monotonic() - began - tricks.DEADLINE_S
        self.arrived = np.flatnonzero(transfer.result.codes == 0)
        self.transfer = transfer
        actor.join(10.0)
        return outcome, over_s

    def close(self) -> None:
        self.villain.close()
        assert self.transfer.wait_quiesced(10.0), "it has not quiesced, and its peer is gone"
        self.agent.close(1.0)


# Of writes, more than what kernels buffer: it is still being sent when its answer comes.
_BLOCK_BYTES = {"read": BLOCK_BYTES, "write": 2 << 20}


@pytest.fixture(params=["tcp", "unix"])
def scene(request: pytest.FixtureRequest) -> Iterator[Scene]:
    verb = "read" if "read" in request.node.name else "write"
    opened = Scene(is_unix=request.param == "unix", block_bytes=_BLOCK_BYTES[verb])
    yield opened
    opened.close()


@pytest.mark.parametrize("trick", tricks.READS, ids=lambda trick: trick.name)
def test_answers_to_a_read(scene: Scene, trick: Trick) -> None:
    outcome, over_s = scene.play(trick, "read")
    assert outcome in trick.errors
    assert over_s < LATE_S_MAX + 0.1
    found = scene.blocks[_ALL]
    assert (found[scene.arrived] == tricks.CONTENT[scene.arrived]).all(), "wrong bytes are counted"
    assert scene.transfer.wait_quiesced(5.0)
    scene.blocks[_ALL] = CANARY
    is_cut_off = scene.villain.socket.is_closed_by_peer(0.2 if not trick.is_cut_off else 5.0)
    if trick.name != "the end of the connection":
        assert is_cut_off == trick.is_cut_off
    assert (scene.blocks == CANARY).all(), "written outside of its blocks, or after its end"
    assert scene.agent.stats()["running"] == 0


@pytest.mark.parametrize("trick", tricks.WRITES, ids=lambda trick: trick.name)
def test_answers_to_a_write(scene: Scene, trick: Trick) -> None:
    outcome, over_s = scene.play(trick, "write")
    assert outcome in trick.errors
    assert over_s < LATE_S_MAX + 0.1
    if trick.name == "a full socket":
        assert scene.transfer.outcome is kvx.LinkOutcome.QUARANTINED
    assert (scene.blocks == CANARY).all(), "a write has changed its source"
    if trick.is_cut_off and trick.name != "the end of the connection":
        assert scene.villain.socket.is_closed_by_peer()

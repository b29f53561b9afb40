"""An agent that has connected with a villain, and asks it for something."""

from __future__ import annotations

import threading
import time

import numpy as np

import kvx
from kvx.errors import KvxError
from tests.transfer.faults import tricks
from tests.transfer.faults.frames import Type
from tests.transfer.faults.trial import Trial
from tests.transfer.faults.tricks import BLOCKS, Trick
from tests.transfer.faults.victim import BLOCK_BYTES, CANARY, KEY
from tests.transfer.faults.villain import Villain

CONFIG = {"backends": ["tcp"], "gossip": False, "ping_s": 5.0, "suspect_after_s": 6.0}
# What surrounds the blocks that are read into.
_MARGIN = 2
_ALL = slice(_MARGIN, _MARGIN + BLOCKS)


class Scene:
    """An agent, and a villain that it has connected with.

    Attributes:
        blocks: The agent's memory, full of `CANARY`.
        target: The blocks of it that are read into, or written.
        transfer: The last one.
        arrived: The blocks of it that are said to have arrived.
    """

    def __init__(self, *, is_unix: bool, block_bytes: int) -> None:
        """Let the agent connect."""
        self.block_bytes = block_bytes
        self.villain = Villain(is_unix=is_unix)
        self.agent = kvx.Agent("honest", key=KEY, config=CONFIG)
        self.blocks = np.full((BLOCKS + 2 * _MARGIN, block_bytes), CANARY, np.uint8)
        self.target = self.blocks[_ALL]
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
        """End the villain, then the agent."""
        self.villain.close()
        assert self.transfer.wait_quiesced(10.0), "it has not quiesced, and its peer is gone"
        self.agent.close(1.0)


# Of writes, more than what kernels buffer: it is still being sent when its answer comes.
_BLOCK_BYTES = {"read": BLOCK_BYTES, "write": 2 << 20}


def open_scene(verb: str, *, is_unix: bool) -> Scene:
    """Return a scene for reads or for writes."""
    return Scene(is_unix=is_unix, block_bytes=_BLOCK_BYTES[verb])


def tell_lies(way: str) -> list[Trial]:
    """Let a villain play every trick once, over ``tcp`` or ``unix``."""
    trials = []
    for verb, chosen in (("read", tricks.READS), ("write", tricks.WRITES)):
        for trick in chosen:
            scene = open_scene(verb, is_unix=way == "unix")
            outcome, over_s = scene.play(trick, verb)
            assert outcome in trick.errors, f"{trick.name} ended as {outcome}"
            # What a villain that is written to says has arrived is its own affair.
            came = scene.arrived if verb == "read" else scene.arrived[:0]
            wrong = sum(bytes(scene.target[one]) != bytes(tricks.CONTENT[one]) for one in came)
            scene.target[:] = CANARY
            scene.close()
            late = int((scene.blocks != CANARY).any(axis=1).sum())
            trials.append(Trial(way, "peer lies", verb, outcome, over_s, late, wrong))
    return trials

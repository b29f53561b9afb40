"""Where faults happen: an initiator in this process, and a victim in one of its own."""

from __future__ import annotations

import os
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np

import kvx
from kvx.errors import KvxError
from kvx.transfer.agents.peer_state import PeerState
from kvx.transfer.agents.transfers import LinkTransfer
from kvx.transfer.memory import MemoryRegion
from tests.transfer.faults.trial import Leaks
from tests.transfer.faults.victim import (
    BLOCK_BYTES,
    KEY,
    NUM_BLOCKS,
    SIZE_BYTES,
    Guarded,
    Way,
    start_victim,
    victim_pattern,
)

GRACE_S = 10.0
# The pattern that is written; the victim holds pattern 1.
WRITTEN = 2
# The block that transfers are tried with.
PROBED = NUM_BLOCKS - 1


@dataclass(slots=True)
class Running:
    """A transfer under way, and when it ended.

    Attributes:
        transfer: None when it could not even be begun.
        deadline: When it has to be over, by time.monotonic().
        first: Its first block.
        count: Its blocks.
        ended: When it was over.
        error: Why it failed.
    """

    is_write: bool
    first: int
    count: int
    deadline: float
    transfer: LinkTransfer | None = None
    ended: float = 0.0
    error: BaseException | None = None
    over: threading.Event = field(default_factory=threading.Event)

    @property
    def outcome(self) -> str:
        """How it ended: ``done``, or the name of its error."""
        return "done" if self.error is None else type(self.error).__name__

    def wait(self) -> None:
        """Wait on this thread, which then receives in place of the agent's."""
        try:
            assert self.transfer is not None, "it was begun"
            self.transfer.wait()
        except BaseException as error:  # noqa: BLE001 - it is what is tested
            self.error = error
        self.ended = time.monotonic()
        self.over.set()

    def arrived(self) -> list[int]:
        """Return the blocks that are said to have arrived."""
        result = None if self.transfer is None else self.transfer.result
        if result is None:
            return []
        return [self.first + int(place) for place in np.flatnonzero(result.codes == 0)]


class Ground(Guarded):
    """An agent that outlives many victims.

    Attributes:
        agent: The initiator.
        blocks: (NUM_BLOCKS, BLOCK_BYTES) uint8, its memory.
        victim: Whom things happen to.
        peer: The same, as the initiator sees it.
        usual_s: How long all blocks take, by verb.
    """

    def __init__(self, way: Way, *, has_thread: bool = True) -> None:
        """Open the agent.

        Args:
            way: How bytes go.
            has_thread: Whether a thread waits for every transfer; else the agent's own settles it.
        """
        self.way = way
        self.has_thread = has_thread
        self.agent = kvx.Agent("initiator", key=KEY, config=way.config)
        self._region = MemoryRegion(SIZE_BYTES, is_shared=way.is_shared)
        self.blocks = self._region.array()[:SIZE_BYTES].reshape(NUM_BLOCKS, BLOCK_BYTES)
        self.register()
        self.usual_s: dict[bool, float] = {}
        self._count = 0
        self.raise_victim()
        for is_write in (False, True, False, True):
            began = time.monotonic()
            self.end(self.begin(is_write=is_write, deadline_s=GRACE_S))
            self.usual_s[is_write] = time.monotonic() - began
        self.victim.ask("fill", 1)
        self._descriptors, self._rss_bytes = _descriptors(), _rss_bytes()

    def raise_victim(self, target: str | None = None) -> None:
        """Start another victim in place of the last one, and be connected with it."""
        self.victim = start_victim(self.way)
        self.join(target)

    def join(self, target: str | None = None) -> None:
        """Be connected with the victim, and have a lease of it."""
        self.peer = self.agent.connect(self.victim.ask("card") if target is None else target, 20.0)
        self.renew()
        self.begin_anew()

    def register(self) -> None:
        """Register the initiator's memory, for the first time or again."""
        self.registration = self.agent.register(self._region if self.way.is_shared else self.blocks)

    def renew(self) -> None:
        """Ask for another lease."""
        self.token = self.victim.ask("token")

    def begin_anew(self) -> None:
        """Move one block each way, and fill the victim anew."""
        self.move_one()
        self.victim.ask("fill", 1)

    def move_one(self) -> None:
        """Read and write one block; where both ends are well that works at once."""
        objection = self.objection()
        assert not objection, f"no transfer is possible: {objection}"

    def objection(self) -> str:
        """Return why a block cannot be read or written now; empty when both has worked."""
        for is_write in (False, True):
            running = self.end(
                self.begin(is_write=is_write, first=PROBED, count=1, deadline_s=GRACE_S)
            )
            if running.error is not None:
                return repr(running.error)
        return ""

    def begin(
        self, *, is_write: bool, deadline_s: float, first: int = 0, count: int = NUM_BLOCKS,
        token: bytes | None = None, is_watched: bool = True,
    ) -> Running:  # fmt: skip
        """Begin to move blocks; what cannot be begun has ended at once."""
        places = np.arange(first, first + count) * BLOCK_BYTES
        sizes = np.full(count, BLOCK_BYTES)
        self.blocks[first : first + count] = victim_pattern(WRITTEN)[first : first + count]
        running = Running(is_write, first, count, time.monotonic() + deadline_s)
        act = self.agent.write if is_write else self.agent.read
        try:
            remote = self.peer.descriptors(
                places, sizes, lease=self.token if token is None else token
            )
            running.transfer = act(
                self.registration.descriptors(places, sizes),
                remote,
                deadline_s=deadline_s,
                backend=self.way.backend,
            )
        except KvxError as error:
            running.error = error
            running.ended = time.monotonic()
            running.over.set()
            return running
        if not is_watched:
            return running
        if self.has_thread:
            threading.Thread(target=running.wait, daemon=True).start()
        else:
            running.transfer.add_done_callback(lambda: _note_end(running))
        return running

    @staticmethod
    def end(running: Running) -> Running:
        """Wait for the end of a transfer, which has to come."""
        left_s = max(0.0, running.deadline - time.monotonic())
        assert running.over.wait(left_s + GRACE_S), "it never ended"
        return running

    def is_stuck(self, running: Running) -> bool:
        """Return whether it does not quiesce although everybody is well, or gone."""
        return running.transfer is not None and not running.transfer.wait_quiesced(GRACE_S)

    def wrong(self, running: Running, *, has_victim: bool = True) -> int:
        """Return how many blocks are said to have arrived and did not."""
        arrived = running.arrived()
        if not arrived:
            return 0
        if running.is_write:
            return int(self.victim.ask("wrong", WRITTEN, arrived)) if has_victim else 0
        return int((self.blocks[arrived] != victim_pattern(1)[arrived]).any(axis=1).sum())

    def await_peer(self, *wanted: PeerState, timeout_s: float = 5.0) -> str:
        """Return the state of the peer, one of those wanted when it comes to that in time."""
        end = time.monotonic() + timeout_s
        while self.peer.state not in wanted and time.monotonic() < end:
            time.sleep(0.01)
        return self.peer.state.value

    def discard(self) -> None:
        """End the victim, and do not look for it any more."""
        self.peer.close()
        self.victim.kill()
        self.victim.close()
        self.await_peer(PeerState.LOST, PeerState.FENCED)

    def leaks(self) -> Leaks:
        """Return what is left after all of it, with a victim alive and idle."""
        end = time.monotonic() + GRACE_S
        while True:
            stats, theirs = self.agent.stats(), self.victim.ask("stats")
            open_files, rss_bytes = _descriptors(), _rss_bytes()
            left = Leaks(
                stats["running"] + theirs["running"],
                len(self.agent.quarantine) + theirs["quarantined"],
                stats["served"] + theirs["served"],
                max(0, open_files - self._descriptors),
                rss_bytes - self._rss_bytes,
            )
            if not left.total or time.monotonic() > end:
                return left
            time.sleep(0.05)

    def mark_memory(self) -> None:
        """Count memory from here, when caches are warm."""
        self._rss_bytes = _rss_bytes()

    def close(self) -> None:
        """End everything."""
        self.discard()
        self.agent.close(5.0)

    def __enter__(self) -> Self:
        """Return the ground."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:  # fmt: skip
        """Close it."""
        self.close()


def _note_end(running: Running) -> None:
    transfer = running.transfer
    assert transfer is not None, "it was begun"
    running.error = transfer.error
    running.ended = time.monotonic()
    running.over.set()


def _descriptors() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def _rss_bytes() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")

"""What is under way in one endpoint: every job until it has quiesced."""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from kvx.errors import UnavailableError

if TYPE_CHECKING:
    from kvx.transfer.backend import Memory
    from kvx.transfer.backends.device.alarm import Alarm
    from kvx.transfer.backends.device.job import DeviceJob
    from kvx.transfer.backends.device.outgoing import Outgoing


@dataclass(frozen=True, slots=True, eq=False)
class Active:
    """A job that has not quiesced.

    Attributes:
        job: The job.
        memory: Of ours.
        peer: Name of the other side.
        life: Its incarnation.
        is_ours: Whether this agent began it.
        is_write: Whether the bytes go to the other side.
        write: The write that the receiver does; None for what is done here.
    """

    job: DeviceJob
    memory: Memory
    peer: str
    life: int
    is_ours: bool = True
    is_write: bool = False
    write: Outgoing | None = None

    def is_with(self, peer: str, life: int) -> bool:
        """Return whether the other side is this life of a peer."""
        return (self.peer, self.life) == (peer, life)


class ActiveJobs:
    """Jobs until they have quiesced. Thread-safe."""

    def __init__(self, alarm: Alarm) -> None:
        """Start empty; `alarm` sees to deadlines."""
        self._alarm = alarm
        self._changed = threading.Condition()
        self._active: dict[DeviceJob, Active] = {}
        self._is_closed = False

    def enter(self, active: Active) -> None:
        """Keep a job; UnavailableError when the agent is closed."""
        job = active.job
        then = job.when_quiet

        def quiet() -> None:
            with self._changed:
                self._active.pop(job, None)
                self._changed.notify_all()
            then()

        job.when_quiet = quiet
        with self._changed:
            if self._is_closed:
                raise UnavailableError("the agent is closed")
            self._active[job] = active
        self._alarm.call_at(job.deadline, job.expire)

    def all(self) -> list[Active]:
        """Return what is under way."""
        with self._changed:
            return list(self._active.values())

    def close(self) -> list[Active]:
        """Take no more; returns what is under way."""
        with self._changed:
            self._is_closed = True
            return list(self._active.values())

    def wait_quiet(self, region: int, timeout_s: float) -> bool:
        """Wait until no job is at a region of ours; False when time was up first."""

        def is_quiet() -> bool:
            return all(one.memory.region != region for one in self._active.values())

        with self._changed:
            return self._changed.wait_for(is_quiet, timeout_s)

    def quarantine(self) -> list[tuple[int, str, bool, int, float]]:
        """Return (id, peer, is_write, bytes, since_s) of what has ended and not quiesced."""
        now_ns = time.monotonic_ns()
        return [
            (
                one.job.id, one.peer, one.is_write, one.job.bytes,
                (now_ns - one.job.ended_ns) / 1e9,
            )
            for one in self.all()
            if one.is_ours and one.job.is_terminal() and not one.job.is_quiesced()
        ]  # fmt: skip

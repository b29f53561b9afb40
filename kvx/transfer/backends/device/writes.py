"""The writes of one endpoint that their receivers have not answered."""

from __future__ import annotations

import functools
import threading
import time
from typing import TYPE_CHECKING

from kvx.transfer.agents import descriptors
from kvx.transfer.backends.device.active import Active
from kvx.transfer.backends.device.job import DeviceJob
from kvx.transfer.backends.device.messages import Done, Message, Note
from kvx.transfer.backends.device.outgoing import Outgoing
from kvx.transfer.core import LeaseRef

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from kvx.transfer.backend import BackendHost, LinkRequest, PeerCard
    from kvx.transfer.backends.device.active import ActiveJobs
    from kvx.transfer.backends.device.alarm import Alarm

_CANCEL_GRACE_S = 0.1
# Between two requests to a receiver that was lost: it may be back.
_ASK_EVERY_S = 0.5
# How much longer than its write a lease on our memory lasts: the receiver looks at it at the end.
_LEND_S = 1.0


class Writes:
    """Begins writes and takes their answers. Thread-safe."""

    def __init__(
        self, host: BackendHost, jobs: ActiveJobs, alarm: Alarm, *,
        numbers: Iterator[int], send: Callable[[str, Message], None],
        try_send: Callable[[str, Message], None],
    ) -> None:  # fmt: skip
        """Know how to reach receivers."""
        self._host = host
        self._jobs = jobs
        self._alarm = alarm
        self._numbers = numbers
        self._send = send
        self._try_send = try_send
        self._lock = threading.Lock()
        self._writes: dict[int, Outgoing] = {}

    def make(self, request: LinkRequest, peer: PeerCard) -> Outgoing:
        """Return a write, to be begun with `begin`; it is under way from here on."""
        core, plan = self._host.core, request.plan
        own = LeaseRef(
            *core.grant(
                plan.memory.region, plan.local, rights=1, peer=peer.number,
                ttl_s=request.deadline_s + _LEND_S, checksums=None, keys=None,
            )
        )  # fmt: skip
        job = DeviceJob(
            next(self._numbers), descriptors.totals(plan.local), request.deadline_s,
            ended=self._host.ended,
        )  # fmt: skip

        def over(write: Outgoing) -> None:
            with self._lock:
                for number in [key for key, value in self._writes.items() if value is write]:
                    del self._writes[number]
            core.revoke(own.id, 0.0)
            if request.note and job.state() == "done":
                self._try_send(peer.name, Note(request.note))

        write = Outgoing(
            job, request, own, life=self._host.incarnation,
            send=functools.partial(self._send, peer.name), over=over,
            was_cancelled=self._cancel_soon, soon=self._soon,
        )  # fmt: skip
        self._jobs.enter(
            Active(job, plan.memory, peer.name, peer.incarnation, is_write=True, write=write)
        )
        return write

    def begin(self, write: Outgoing) -> None:
        """Tell the receiver."""
        write.begin(self._number)

    def answered(self, peer: str, word: Done) -> None:
        """Take an answer, unless it is of somebody else than the receiver."""
        with self._lock:
            write = self._writes.get(word.number)
        if write is not None and self._is_with(write, peer):
            write.answered(word)

    def _is_with(self, write: Outgoing, peer: str) -> bool:
        return any(one.write is write and one.peer == peer for one in self._jobs.all())

    def _number(self, write: Outgoing) -> int:
        number = next(self._numbers)
        with self._lock:
            self._writes[number] = write
        return number

    def _soon(self, method: Callable[[], None]) -> None:
        self._alarm.call_at(time.monotonic() + _ASK_EVERY_S, method)

    def _cancel_soon(self, job: DeviceJob) -> None:
        self._alarm.call_at(time.monotonic() + _CANCEL_GRACE_S, job.expire_cancelled)

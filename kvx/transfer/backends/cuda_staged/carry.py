"""One staged transfer, on a thread of its own: windows go through two buffers in turn.

While the core moves one window between hosts, the other is on its way between host memory and the
device. A job that ends early asks the core and the device to leave out what they have not begun;
it quiesces when both are through, and the buffers are used again only then.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from kvx.errors import KvxError
from kvx.transfer.agents import descriptors
from kvx.transfer.agents.staged import back_to_back, spans
from kvx.transfer.backends.cuda_staged.buffers import WINDOW_BYTES
from kvx.transfer.backends.device.job import code_of
from kvx.transfer.backends.device.turns import Turn
from kvx.transfer.codes import Code

if TYPE_CHECKING:
    from collections.abc import Callable

    import numpy.typing as npt

    from kvx.transfer.backend import Memory
    from kvx.transfer.backends.cuda_staged.buffers import Buffer, Buffers
    from kvx.transfer.backends.device.desk import Desk
    from kvx.transfer.backends.device.job import DeviceJob
    from kvx.transfer.core import LinkJob
    from kvx_ext import _core

_DEPTH = 2
# Between two looks at something that may never end, such as a device that hangs.
_LOOK_S = 3600.0


@dataclass(frozen=True, slots=True, eq=False)
class CarryPlan:
    """What is carried.

    Attributes:
        memory: Of ours, on a device.
        local: (n, 4) int64 rows in it; no two overlap where they are written.
        is_write: Whether the bytes go to the peer.
        submit: Begins to move blocks [start, stop) between a region of the core, where they lie
            as the given rows, and the peer; the last argument is the time it has.
        after: A point in a stream that the device waits for; None for none.
        may_write: Whether our own memory may still be written.
    """

    memory: Memory
    local: npt.NDArray[np.int64]
    is_write: bool
    submit: Callable[[int, npt.NDArray[np.int64], int, int, float], LinkJob]
    after: _core.StreamMark | None = None
    may_write: Callable[[], bool] = lambda: True


@dataclass(slots=True, eq=False)
class _Window:
    """Neighbouring blocks in a buffer."""

    start: int
    stop: int
    buffer: Buffer
    places: npt.NDArray[np.int64]
    link: LinkJob | None = None
    ticket: int = 0
    outcome: tuple[Code, int] = (Code.OK, 0)
    has_landed: threading.Event = field(default_factory=threading.Event)


class Carry:
    """See the module."""

    def __init__(self, job: DeviceJob, plan: CarryPlan, desk: Desk, buffers: Buffers) -> None:
        """Get ready; `run` does it all."""
        self._job = job
        self._plan = plan
        self._desk = desk
        self._buffers = buffers
        self._lock = threading.Lock()
        self._under_way: deque[_Window] = deque()
        self._may_begin = threading.Event()
        job.when_ended = self._give_up

    def run(self) -> None:
        """Carry all windows; returns when nothing moves any more."""
        turn = Turn(self._plan.memory.region, self._plan.local, self._may_begin.set)
        if not self._plan.is_write:
            self._desk.do(lambda: self._desk.turns.take(turn))
            self._may_begin.wait()
        for start, stop in spans(self._plan.local, WINDOW_BYTES):
            while len(self._under_way) >= _DEPTH:
                self._finish_first()
            if self._job.is_terminal():
                break
            self._begin(start, stop)
        while self._under_way:
            self._finish_first()
        if not self._plan.is_write:
            self._desk.do(lambda: self._desk.turns.leave(turn))
        self._job.conclude()
        self._job.settle()

    def _begin(self, start: int, stop: int) -> None:
        """Begin the first half of a window's way."""
        rows = self._plan.local[start:stop]
        try:
            buffer = self._buffers.take(self._desk, int(descriptors.totals(rows).sum()))
        except KvxError as error:
            self._job.end(code_of(error), str(error))
            return
        window = _Window(start, stop, buffer, back_to_back(rows))
        with self._lock:
            self._under_way.append(window)
        if self._plan.is_write:
            self._copy(window)
        else:
            self._link(window)

    def _finish_first(self) -> None:
        """See the oldest window through, whatever becomes of it."""
        window = self._under_way[0]
        if self._plan.is_write:
            self._to_peer(window)
        else:
            self._from_peer(window)
        with self._lock:
            self._under_way.popleft()
        self._buffers.give_back(window.buffer)

    def _from_peer(self, window: _Window) -> None:
        link = window.link
        if link is None:
            return
        _wait_for(link)
        codes, sums = link.codes(), link.checksums()
        good = np.flatnonzero(codes == Code.OK)
        if len(good) and not self._job.is_terminal():
            if self._plan.may_write():
                self._copy(window, good)
                code, error = self._landed(window)
            else:
                code, error = Code.STALE, 0
            if code is not Code.OK:
                codes[good] = code
                self._note_device(code, error)
        self._job.decide(window.start, codes, sums)

    def _to_peer(self, window: _Window) -> None:
        code, error = self._landed(window)
        if code is not Code.OK:
            self._job.decide(window.start, np.full(len(window.places), code, np.int32), error=error)
            self._note_device(code, error)
            return
        if self._job.is_terminal():
            return
        self._desk.device.note_host_access(
            window.buffer.memory.address, window.places, is_write=False
        )
        self._link(window)
        if window.link is not None:
            _wait_for(window.link)
            self._job.decide(window.start, window.link.codes(), window.link.checksums())

    def _link(self, window: _Window) -> None:
        left_s = max(0.001, self._job.deadline - time.monotonic())
        try:
            link = self._plan.submit(
                window.buffer.region, window.places, window.start, window.stop, left_s
            )
        except KvxError as error:
            self._job.end(code_of(error), str(error))
            return
        with self._lock:
            window.link = link
        if self._job.is_terminal():
            link.cancel()

    def _copy(self, window: _Window, some: npt.NDArray[np.intp] | None = None) -> None:
        rows, places = self._plan.local[window.start : window.stop], window.places
        if some is not None:
            rows, places = np.ascontiguousarray(rows[some]), np.ascontiguousarray(places[some])
        host = (window.buffer.memory.address, places)
        device = (self._plan.memory.address, rows)

        def landed(code: Code, error: int) -> None:
            window.outcome = (code, error)
            window.has_landed.set()

        def begin() -> None:
            if self._plan.is_write:
                window.ticket = self._desk.copy("d2h", host, device, self._plan.after, landed)
                return
            self._desk.device.note_host_access(host[0], places, is_write=True)
            window.ticket = self._desk.copy("h2d", device, host, self._plan.after, landed)

        window.has_landed.clear()
        self._desk.do(begin)

    def _landed(self, window: _Window) -> tuple[Code, int]:
        while not window.has_landed.wait(_LOOK_S):
            continue
        return window.outcome

    def _note_device(self, code: Code, error: int) -> None:
        if code is Code.DEVICE:
            self._job.explain(f"device {self._desk.ordinal} failed a copy (error {error})")

    def _give_up(self) -> None:
        """Ask everybody to leave out what they have not begun: the job has ended."""
        self._may_begin.set()
        with self._lock:
            links = [one.link for one in self._under_way if one.link is not None]
            tickets = [one.ticket for one in self._under_way if one.ticket]
        for link in links:
            link.cancel()
        for ticket in tickets:
            self._desk.give_up(ticket)


def _wait_for(link: LinkJob) -> None:
    """Wait until nothing of it moves: it ends by its deadline, and quiesces when it can."""
    while not (link.wait(_LOOK_S) and link.wait_quiesced(_LOOK_S)):
        continue

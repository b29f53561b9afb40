"""One transfer's copies out of mapped memory of a peer, window after window, on a desk's thread.

Before a window is handed to the device, and when it has landed, the peer's lease is looked at:
what was copied while it ended does not count. What has landed in host memory is checksummed there
and held against what is expected; bytes that fail are overwritten. What has landed in device memory
is checked by the lease alone, unless it is to be read back.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

import numpy as np

from kvx.buffers import MemoryKind
from kvx.errors import KvxError
from kvx.transfer.agents import descriptors
from kvx.transfer.agents.staged import back_to_back, spans
from kvx.transfer.backends.cuda_ipc.host_bytes import bytes_of, poison
from kvx.transfer.backends.device.job import code_of
from kvx.transfer.backends.device.pinned import PinnedRegion
from kvx.transfer.backends.device.turns import Turn
from kvx.transfer.codes import Code
from kvx_ext import _core

if TYPE_CHECKING:
    from collections.abc import Callable

    import numpy.typing as npt

    from kvx.transfer.backends.cuda_ipc.imports import Import
    from kvx.transfer.backends.device.desk import Desk
    from kvx.transfer.backends.device.job import DeviceJob
    from kvx.transfer.backends.device.plan import PullPlan

# So many at a time: while some are copied others are verified.
WINDOW_BYTES = 16 << 20
_IN_FLIGHT = 4
# From here on a window is worth another thread: a CPU verifies no faster than a link copies.
_INLINE_BYTES = 1 << 20


class Pull:
    """See the module; everything runs on the desk's thread."""

    def __init__(
        self, job: DeviceJob, plan: PullPlan, source: Import, over: Callable[[], None]
    ) -> None:
        """Get ready; `begin` begins.

        Args:
            job: What is told; it settles when the pull is over, by `over`.
            plan: What goes where.
            source: Where from; in use until `over`.
            over: Called when nothing of it is with a device any more.
        """
        self._job = job
        self._plan = plan
        self._source = source
        self._desk = source.desk
        self._over = over
        self._is_to_host = plan.target.kind is MemoryKind.HOST
        self._windows = spans(plan.local, WINDOW_BYTES)[::-1]
        self._tickets: set[int] = set()
        self._mirror: PinnedRegion | None = None
        self._is_reading_back = False
        self._verifying = 0
        self._landed: list[tuple[int, int]] = []
        self._turn: Turn | None = Turn(plan.target.region, plan.local, self._start)

    def begin(self) -> None:
        """Hand the first windows to the device, when it is free to write there."""
        if self._turn is not None:
            self._desk.turns.take(self._turn)

    def _start(self) -> None:
        if self._is_to_host:
            self._desk.pin(self._plan.target)
        self._go_on()

    def give_up(self) -> None:
        """Ask that windows the device has not begun be left out; the job has ended."""
        for ticket in list(self._tickets):
            self._desk.give_up(ticket)
        self._go_on()

    def _go_on(self) -> None:
        while self._windows and self._in_flight() < _IN_FLIGHT and not self._job.is_terminal():
            start, stop = self._windows.pop()
            code = self._plan.look()
            if code is Code.OK:
                self._submit(start, stop)
                continue
            self._job.end(code)
        if self._in_flight() == 0 and self._turn is not None:
            turn, self._turn = self._turn, None
            self._desk.turns.leave(turn)
            if self._mirror is not None:
                self._mirror.close()
            self._job.conclude()
            self._over()

    def _in_flight(self) -> int:
        waiting = len(self._landed) + self._is_reading_back
        return len(self._tickets) + self._verifying + waiting

    def _submit(self, start: int, stop: int) -> None:
        plan, part = self._plan, slice(start, stop)
        try:
            ticket = self._desk.copy(
                "d2h" if self._is_to_host else "d2d",
                (plan.target.address, plan.local[part]),
                (self._source.address, plan.remote[part]),
                plan.after,
                lambda code, error: self._land(ticket, start, stop, code, error),
            )
        except KvxError as error:
            self._job.end(code_of(error), str(error))
            return
        self._tickets.add(ticket)

    def _land(self, ticket: int, start: int, stop: int, code: Code, error: int) -> None:
        self._tickets.discard(ticket)
        if code is Code.OK:
            # Without a look nothing counts, also what an ended job has brought.
            code = self._plan.look()
        if code is Code.OK and not self._job.is_terminal():
            self._take(start, stop)
        else:
            self._refuse(start, stop, code, error)
        self._go_on()

    def _refuse(self, start: int, stop: int, code: Code, error: int) -> None:
        outcome = Code.CANCELLED if code is Code.OK else code
        self._job.decide(start, np.full(stop - start, outcome, np.int32), error=error)
        # Only what has landed: nobody knows what a device that failed is still doing.
        has_landed = code in (Code.STALE, Code.PEER_LOST)
        if self._is_to_host and has_landed and self._plan.may_write():
            self._poison(self._plan.local[start:stop])
        if code is Code.DEVICE:
            self._job.end(code, f"device {self._desk.ordinal} failed a copy: {_health(self._desk)}")

    def _take(self, start: int, stop: int) -> None:
        """Let what has landed count, verified first where it can be."""
        plan, part = self._plan, slice(start, stop)
        if self._is_to_host:
            self._verifying += 1
            if int(descriptors.totals(plan.local[part]).sum()) < _INLINE_BYTES:
                self._verify_host(start, stop)
                self._verifying -= 1
            else:
                self._desk.verifiers.do(lambda: self._verify_beside(start, stop))
        elif plan.reads_back and plan.checksums is not None:
            self._landed.append((start, stop))
            self._read_back()
        else:
            self._job.decide(start, np.full(stop - start, Code.OK, np.int32))

    def _verify_host(self, start: int, stop: int) -> None:
        plan = self._plan
        rows = plan.local[start:stop]
        self._desk.device.note_host_access(plan.target.address, rows, is_write=False)
        self._verify(start, stop, bytes_of(plan.target), rows)

    def _verify_beside(self, start: int, stop: int) -> None:
        """Verify on a thread of its own, and go on with the desk's."""

        def verified() -> None:
            self._verifying -= 1
            self._go_on()

        try:
            self._verify_host(start, stop)
        finally:
            self._desk.do(verified)

    def _verify(
        self, start: int, stop: int, memory: npt.NDArray[np.uint8], rows: npt.NDArray[np.int64]
    ) -> None:
        plan, part = self._plan, slice(start, stop)
        sums = _core.row_checksums(memory, rows, None if plan.keys is None else plan.keys[part])
        codes = np.full(stop - start, Code.OK, np.int32)
        if plan.checksums is not None:
            wrong = sums != plan.checksums[part]
            codes[wrong] = Code.CORRUPT
            if self._is_to_host and wrong.any():
                self._poison(plan.local[part][wrong])
        self._job.decide(start, codes, sums)

    def _poison(self, rows: npt.NDArray[np.int64]) -> None:
        self._desk.device.note_host_access(self._plan.target.address, rows, is_write=True)
        poison(bytes_of(self._plan.target), rows)

    def _read_back(self) -> None:
        """Bring the next landed window into host memory and verify it there."""
        if self._is_reading_back or not self._landed:
            return
        start, stop = self._landed.pop(0)
        rows = self._plan.local[start:stop]
        places = back_to_back(rows)
        needed = int(places[-1, 0] + places[-1, 3])
        try:
            if self._mirror is None or self._mirror.size_bytes < needed:
                if self._mirror is not None:
                    self._mirror.close()
                self._mirror = PinnedRegion(self._desk.device, max(needed, WINDOW_BYTES))
            mirror = self._mirror
            self._desk.copy(
                "d2h", (mirror.address, places), (self._plan.target.address, rows), None,
                functools.partial(self._verify_back, start, stop, places),
            )  # fmt: skip
        except KvxError as error:
            self._job.end(code_of(error), str(error))
            self._landed.clear()
            return
        self._is_reading_back = True

    def _verify_back(
        self, start: int, stop: int, places: npt.NDArray[np.int64], code: Code, error: int
    ) -> None:
        self._is_reading_back = False
        assert self._mirror is not None, "it was copied into"
        if code is Code.OK:
            self._desk.device.note_host_access(self._mirror.address, places, is_write=False)
            self._verify(start, stop, self._mirror.array, places)
        else:
            self._refuse(start, stop, code, error)
        self._read_back()
        self._go_on()


def _health(desk: Desk) -> str:
    try:
        return desk.device.health() or "the driver says no more"
    except KvxError as error:
        return str(error)

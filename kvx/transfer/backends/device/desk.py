"""One device: its copies, and the thread that plans them and takes in what has landed.

Everything that decides about a copy runs on this thread, in the order it was handed in, so nothing
of it needs a lock. It sleeps in the native core until a copy lands or somebody hands in work.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from typing import TYPE_CHECKING

from kvx.errors import KvxError, UnavailableError
from kvx.transfer.backends.device.clerk import Clerk
from kvx.transfer.backends.device.driver import LIBRARY
from kvx.transfer.backends.device.turns import Turns
from kvx.transfer.codes import Code
from kvx_ext import _core

if TYPE_CHECKING:
    from collections.abc import Callable

    import numpy as np
    import numpy.typing as npt

    from kvx.transfer.backend import Memory

    Landed = Callable[[Code, int], None]

_log = logging.getLogger(__name__)
_IDLE_S = 3600.0
# Between two looks at a stream that is waited for: a CPU has no other way to learn of it.
_MARK_PAUSE_S = 0.5e-3
_ALIGNMENT = 4096
# One verifies about as much a second as a third of what a link brings.
_VERIFIERS = 3
# Desks whose device may still copy: what they hold must outlive it.
_ABANDONED: list[Desk] = []


class Desk:
    """Copies of one device. `do` and `close` are thread-safe, the rest is for work done by `do`.

    Attributes:
        device: The device.
        ordinal: As the driver counts.
        uuid: Of the device, the same in every process.
        turns: Who writes what.
        verifiers: Threads that look at what has landed in host memory.
    """

    def __init__(self, ordinal: int, name: str) -> None:
        """Open the device and start the thread.

        Raises:
            UnavailableError: There is no such device.
        """
        self.device = _core.open_cuda_device(LIBRARY, ordinal)
        self.ordinal = ordinal
        self.uuid = str(self.device.info()["uuid"])
        # Copy engines only: compute units belong to the model.
        self._copies = _core.Copies(self.device, sm="never", staging_bytes=0)
        self._work: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._landing: dict[int, Landed] = {}
        self._marks: list[tuple[_core.StreamMark, Callable[[Code], None]]] = []
        self._pins: dict[int, _core.PinnedRange] = {}
        self.turns = Turns()
        self.verifiers = Clerk(f"{name}-verify", threads_max=_VERIFIERS)
        self._is_stopping = False
        self._thread = threading.Thread(target=self._run, name=f"{name}-{ordinal}", daemon=True)
        self._thread.start()

    def do(self, work: Callable[[], None]) -> None:
        """Have something done on the desk's thread."""
        self._work.put(work)
        self._copies.wake()

    def copy(
        self,
        direction: str,
        target: tuple[int, npt.NDArray[np.int64]],
        source: tuple[int, npt.NDArray[np.int64]],
        after: _core.StreamMark | None,
        landed: Landed,
    ) -> int:
        """Begin to copy blocks; returns a ticket.

        Args:
            direction: ``h2d``, ``d2h`` or ``d2d``.
            target: Base address and (n, 4) int64 rows.
            source: The same, of the same sizes.
            after: A point in a stream that is waited for.
            landed: Called with its code and CUresult when no engine touches the memory any more.
        """
        ticket = self._copies.submit_blocks(direction, *target, *source, after)
        self._landing[ticket] = landed
        return ticket

    def give_up(self, ticket: int) -> None:
        """Ask that a copy not be begun; it lands all the same. Thread-safe."""
        self._copies.cancel(ticket)

    def when(self, mark: _core.StreamMark, then: Callable[[Code], None]) -> None:
        """Call `then` when a mark was reached (OK), or never will be (DEVICE)."""
        self._marks.append((mark, then))

    def pin(self, memory: Memory) -> None:
        """Let host memory be copied at full speed; where that is refused it is slow."""
        if memory.region in self._pins or memory.address % _ALIGNMENT:
            return
        try:
            self._pins[memory.region] = self.device.pin(memory.address, memory.size_bytes)
        except KvxError as error:
            _log.warning("region %d is copied unpinned: %s", memory.region, error)

    def unpin(self, region: int) -> None:
        """Undo it. REQUIRES: no copy on the memory is in flight."""
        pinned = self._pins.pop(region, None)
        if pinned is not None:
            pinned.close()

    def run(self, work: Callable[[], None], timeout_s: float) -> bool:
        """Have something done and wait for it; False when time was up first. Thread-safe."""
        is_done = threading.Event()

        def noted() -> None:
            try:
                work()
            finally:
                is_done.set()

        self.do(noted)
        return is_done.wait(timeout_s)

    def close(self, timeout_s: float) -> bool:
        """Let what was begun land, and end; False when the device still copies."""
        end = time.monotonic() + timeout_s

        def stop() -> None:
            self._is_stopping = True

        self.do(stop)
        self._thread.join(timeout_s)
        self.verifiers.close(max(0.0, end - time.monotonic()))
        abandoned = self._copies.close(max(0.0, end - time.monotonic()))
        if abandoned or self._thread.is_alive():
            _log.warning("device %d still copies: its memory is kept", self.ordinal)
            _ABANDONED.append(self)
            return False
        for region in list(self._pins):
            self.unpin(region)
        self.device.close()
        return True

    def _run(self) -> None:
        while not (self._is_stopping and not self._landing and self._work.empty()):
            pause_s = _MARK_PAUSE_S if self._marks else _IDLE_S
            landed = self._copies.wait_any(pause_s if self._work.empty() else 0.0)
            for ticket, code, error in landed:
                _logged(self._landing.pop(ticket), Code(code), error)
            while not self._work.empty():
                _logged(self._work.get())
            if self._marks:
                self._look_at_marks()

    def _look_at_marks(self) -> None:
        marks, self._marks = self._marks, []
        for mark, then in marks:
            try:
                is_reached = mark.is_reached()
            except KvxError:
                _logged(then, Code.DEVICE)
                continue
            if is_reached:
                _logged(then, Code.OK)
            else:
                self._marks.append((mark, then))


class Desks:
    """The desks of one endpoint, each opened when somebody first needs its device. Thread-safe."""

    def __init__(self, name: str) -> None:
        """Open none yet."""
        self._name = name
        self._lock = threading.Lock()
        self._desks: dict[int, Desk] = {}
        self._is_closed = False

    def at(self, ordinal: int) -> Desk:
        """Return the desk of a device by its number; UnavailableError when there is none."""
        with self._lock:
            if self._is_closed:
                raise UnavailableError("the agent is closed")
            if ordinal not in self._desks:
                self._desks[ordinal] = Desk(ordinal, self._name)
            return self._desks[ordinal]

    def of(self, uuid: str) -> Desk:
        """Return the desk of a device by its UUID; UnavailableError when it is not visible."""
        with self._lock:
            found = next((one for one in self._desks.values() if one.uuid == uuid), None)
        return found or self.at(self.ordinal_of(uuid))

    def ordinal_of(self, uuid: str) -> int:
        """Return the number of a device; UnavailableError when it is not visible."""
        devices = _core.list_cuda_devices(LIBRARY)
        for info in devices:
            if info["uuid"] == uuid:
                return int(str(info["ordinal"]))
        raise UnavailableError(
            f"device {uuid} is not visible to this process: add it to CUDA_VISIBLE_DEVICES"
        )

    def open(self) -> list[Desk]:
        """Return those that were opened."""
        with self._lock:
            return list(self._desks.values())

    def close(self, timeout_s: float) -> bool:
        """Close them all; False when a device still copies."""
        end = time.monotonic() + timeout_s
        with self._lock:
            self._is_closed = True
            desks, self._desks = list(self._desks.values()), {}
        is_free = True
        for desk in desks:
            is_free &= desk.close(max(0.1, end - time.monotonic()))
        return is_free


def _logged(work: Callable[..., None], *arguments: object) -> None:
    try:
        work(*arguments)
    except Exception:  # noqa: BLE001 - logged; the thread serves other transfers too
        _log.exception("work at a device failed")

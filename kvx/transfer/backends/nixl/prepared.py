"""A plan as NIXL has checked it, and one pass of its bytes.

    Prepared   lists of both sides, made once a plan, and idle requests by batch
    Flight     one transfer's requests: which are to be posted, which are under way

Invariant: a request is released or posted again only after NIXL has reported its end. What NIXL
calls releasing or cancelling a request under way does not stop it.
"""

from __future__ import annotations

import threading
from collections import defaultdict, deque
from typing import TYPE_CHECKING

import numpy as np

from kvx.buffers import MemoryKind
from kvx.errors import UnavailableError
from kvx.transfer.backends.nixl import rows
from kvx.transfer.backends.nixl.bindings import Progress

if TYPE_CHECKING:
    import numpy.typing as npt

    from kvx.transfer.backend import LinkPlan, Memory
    from kvx.transfer.backends.nixl.bindings import NixlAgent
    from kvx.transfer.backends.nixl.messages import Region
    from kvx.transfer.backends.nixl.rows import Batch, Int64s


class Prepared:
    """Both sides of a plan, known to NIXL. Thread-safe; goes once nobody uses it any more."""

    def __init__(
        self, nixl: NixlAgent, peer: str, plan: LinkPlan, region: Region, batch_bytes: int
    ) -> None:
        """Check and prepare a plan; the maker is its first user.

        Raises:
            UsageError: Blocks outside their regions, or of other sizes on the other side.
            UnavailableError: NIXL does not know the memory.
        """
        rows.check(plan.local, plan.memory.size_bytes, "local")
        rows.check(plan.remote, region.size_bytes, "remote")
        runs = rows.cut(plan.local, plan.remote)
        self.plan = plan
        self.block_bytes = rows.totals(plan.local)
        self.batches = rows.batches(runs, batch_bytes)
        self._nixl = nixl
        self._lock = threading.Lock()
        self._users = 1
        self._idle: defaultdict[tuple[int, bool], list[int]] = defaultdict(list)
        memory = plan.memory
        ours = _listed(memory.address + runs.local, runs.sizes, memory.device_ordinal)
        theirs = _listed(region.address + runs.remote, runs.sizes, region.ordinal)
        self._local = nixl.prepare("", ours, memory.kind)
        try:
            self._remote = nixl.prepare(peer, theirs, _kind_of(region))
        except BaseException:
            nixl.release_prepared(self._local)
            raise

    @property
    def memory(self) -> Memory:
        """The local side."""
        return self.plan.memory

    @property
    def region(self) -> int:
        """The peer's region of the other side."""
        return self.plan.remote_region

    def take(self, number: int, *, is_write: bool) -> int:
        """Return a request for one batch that nobody else uses."""
        with self._lock:
            if self._idle[number, is_write]:
                return self._idle[number, is_write].pop()
        batch = self.batches[number]
        indices = np.arange(batch.first_run, batch.end_run, dtype=np.int32)
        return self._nixl.request(self._local, self._remote, indices, is_write=is_write)

    def give_back(self, number: int, request: int, *, is_write: bool) -> None:
        """Keep a request that is done for the next transfer."""
        with self._lock:
            self._idle[number, is_write].append(request)

    def hold(self) -> None:
        """Count one more user."""
        with self._lock:
            assert self._users > 0, "a plan in use is not gone"
            self._users += 1

    def release(self) -> None:
        """Count one user less; the last one lets NIXL forget the lists."""
        with self._lock:
            self._users -= 1
            if self._users:
                return
        for requests in self._idle.values():
            for request in requests:
                self._nixl.release_request(request)
        self._nixl.release_prepared(self._local)
        self._nixl.release_prepared(self._remote)


class Flight:
    """The requests of one transfer. Used by one thread."""

    def __init__(
        self, nixl: NixlAgent, prepared: Prepared, *, is_write: bool, in_flight_max: int
    ) -> None:
        """Post nothing yet. The flight uses `prepared` until it has `landed`."""
        prepared.hold()
        self._nixl = nixl
        self._prepared = prepared
        self._is_write = is_write
        self._in_flight_max = in_flight_max
        self._next = 0
        self._in_flight: deque[tuple[int, int]] = deque()
        self._failure: Progress | None = None
        self._has_landed = False

    @property
    def failure(self) -> Progress | None:
        """How the first request that did not arrive ended: LOST or FAILED."""
        return self._failure

    @property
    def is_under_way(self) -> bool:
        """Whether NIXL may touch memory for it."""
        return bool(self._in_flight)

    def post(self) -> Batch | None:
        """Post batches until there is no room, or one arrives at once, which is returned.

        Over shared memory NIXL copies in this call: other transfers get their turn in between.
        """
        while self._failure is None and self._next < len(self._prepared.batches):
            if len(self._in_flight) >= self._in_flight_max:
                return None
            number, self._next = self._next, self._next + 1
            try:
                request = self._prepared.take(number, is_write=self._is_write)
            except UnavailableError:  # NIXL has lost the peer since the plan was prepared
                self._failure = Progress.LOST
                return None
            batch = self._sort(number, request, self._nixl.post(request))
            if batch is not None:
                return batch
        return None

    def poll(self) -> list[Batch]:
        """Return the batches that have arrived since the last time."""
        arrived = []
        for _ in range(len(self._in_flight)):
            number, request = self._in_flight.popleft()
            batch = self._sort(number, request, self._nixl.poll(request))
            if batch is not None:
                arrived.append(batch)
        return arrived

    def land(self) -> None:
        """Let go of the plan. REQUIRES: not under way, and nothing more will be posted."""
        assert not self._in_flight, "requests under way are never let go"
        if not self._has_landed:
            self._has_landed = True
            self._prepared.release()

    def _sort(self, number: int, request: int, progress: Progress) -> Batch | None:
        """Put a request where it belongs; returns its batch when that has arrived."""
        if not progress.is_end:
            self._in_flight.append((number, request))
            return None
        if progress is Progress.DONE:
            self._prepared.give_back(number, request, is_write=self._is_write)
            return self._prepared.batches[number]
        self._nixl.release_request(request)
        self._failure = self._failure or progress
        return None


def _listed(addresses: Int64s, sizes: Int64s, ordinal: int) -> npt.NDArray[np.uint64]:
    listed = np.zeros((len(sizes), 3), np.uint64)
    listed[:, 0] = addresses
    listed[:, 1] = sizes
    listed[:, 2] = max(ordinal, 0)
    return listed


def _kind_of(region: Region) -> MemoryKind:
    return MemoryKind.DEVICE if region.is_device else MemoryKind.HOST

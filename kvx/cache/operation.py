"""One offload, onboard or prefetch: its native jobs, its outcome, and its deadline.

An operation works through its rows (the blocks it was called with) in windows, so that it may be
larger than the pool it passes through. Invariant: every row gets exactly one reason, and the
transfer ends by its deadline even when native jobs do not.
"""

from __future__ import annotations

import contextlib
import threading
import time
from typing import TYPE_CHECKING

import numpy as np

from kvx.cache.reasons import MissReason
from kvx.cache.result import TierKind, TransferResult
from kvx.errors import KvxError, TransferCancelled, TransferTimeout, UsageError
from kvx.transfer.codes import Code
from kvx.transfer.handle import Transfer

if TYPE_CHECKING:
    from collections.abc import Iterator

    import numpy.typing as npt

    from kvx.cache.arrival import Arrival
    from kvx.cache.reactor import MovingJob, Step
    from kvx.cache.shared import Shared

Rows = "npt.NDArray[np.int64]"

# In place of a reason, for a row that has none yet.
PENDING = 255
# Between looks for room; growing, or hundreds of operations that wait would starve the rest.
_RETRY_MIN_S = 0.002
_RETRY_MAX_S = 0.010
_WAIT_SLICE_S = 0.001

REASON_OF_CODE = np.full(len(Code), int(MissReason.TIER_DOWN), np.uint8)
REASON_OF_CODE[Code.OK] = MissReason.HIT
REASON_OF_CODE[Code.CORRUPT] = MissReason.CORRUPT
REASON_OF_CODE[Code.STALE] = MissReason.STALE
REASON_OF_CODE[Code.TIMEOUT] = MissReason.DEADLINE
REASON_OF_CODE[Code.CANCELLED] = MissReason.CANCELLED
REASON_OF_CODE[Code.SKIPPED] = MissReason.DEADLINE


class Operation:
    """Base of the operations; a subclass launches jobs in `_launch` and settles them."""

    def __init__(self, shared: Shared, verb: str, num_rows: int, deadline_s: float) -> None:
        """Make an operation that has not begun; `start` begins it."""
        self.shared = shared
        self.verb = verb
        self.transfer: Transfer[TransferResult] = Transfer(self, f"{verb} of {num_rows} blocks")
        self.reasons = np.full(num_rows, PENDING, np.uint8)
        self.tiers = np.full(num_rows, TierKind.NONE, np.uint8)
        self.waiting: npt.NDArray[np.int64] = np.arange(num_rows, dtype=np.int64)
        self.bytes_done = 0
        self._lock = threading.RLock()
        self._steps: list[Step] = []
        self._extras: list[Step] = []
        self._moving: dict[int, MovingJob] = {}
        self.arrival: Arrival | None = None
        self._began = time.monotonic()
        self._end = self._began + deadline_s
        self._deadline_s = deadline_s
        self._ended_by: KvxError | None = None
        self._retry_s = _RETRY_MIN_S

    def start(self) -> Transfer[TransferResult]:
        """Launch the first window and return the handle."""
        self.pump()
        return self.transfer

    def drive(self, timeout_s: float) -> None:
        """Help along on the waiter's thread: settle the jobs it waited for itself."""
        with self._lock:
            step = next(iter(self._steps + self._extras), None)
        if step is None:
            self.transfer.wait_finished(min(timeout_s, self.remaining_s() + _WAIT_SLICE_S))
        elif not step.wait(timeout_s):
            self.transfer.wait_finished(_WAIT_SLICE_S)
        self.pump()

    def cancel(self) -> None:
        """Stop what has not begun."""
        self._end_early(TransferCancelled(f"{self.verb} was cancelled", bytes_done=self.bytes_done))

    def pump(self) -> None:
        """Launch what can be launched now; finish when nothing is left."""
        with self._lock:
            if self.transfer.wait_finished(0):
                return
            is_going_on = len(self.waiting) or self._steps or self._is_unconfirmed()
            if self.remaining_s() <= 0 and is_going_on:
                self._time_out()
                return
            if len(self.waiting):
                self._launch()
            if self.arrival is not None and not len(self.waiting) and not self._is_fetching():
                self.arrival.all_launched()
            if self._steps or self._is_unconfirmed():
                self._retry_s = _RETRY_MIN_S
                return
            if len(self.waiting):
                self.shared.reactor.call_later(min(self._retry_s, self.remaining_s()), self.pump)
                self._retry_s = min(_RETRY_MAX_S, self._retry_s * 1.5)
                return
            if self._extras:
                return
            # Jobs may notice the end before we do: the transfer ends the same way all the same.
            if self._has_run_out():
                self._time_out()
            elif (self.reasons == MissReason.CANCELLED).any():
                self.cancel()
            else:
                self._finish()

    def _launch(self) -> None:
        """Take rows out of `waiting` and start jobs for them, or give them a reason."""
        raise AssertionError("a subclass launches")

    def _is_unconfirmed(self) -> bool:
        """Return whether something besides jobs has to happen before the end."""
        return False

    def _has_run_out(self) -> bool:
        """Return whether jobs ended because the deadline of this operation has passed."""
        return bool((self.reasons == MissReason.DEADLINE).any())

    def _is_fetching(self) -> bool:
        """Return whether steps are under way whose rows need another job afterwards."""
        return any(step.job.id < 0 for step in self._steps)

    def add_fetch(self, step: Step) -> None:
        """Take in a step that brings rows nearer; they have not arrived with it."""
        with self._lock:
            self._steps.append(step)
            self._moving[step.job.id] = step.job

    @property
    def is_over(self) -> bool:
        """Whether the transfer has ended, in whatever way."""
        return self._ended_by is not None or self.transfer.wait_finished(0)

    def _add(self, step: Step, rows: npt.NDArray[np.int64]) -> None:
        self._steps.append(step)
        self._moving[step.job.id] = step.job
        if self.arrival is not None:
            self.arrival.add(step.job, rows)

    @contextlib.contextmanager
    def held_open(self) -> Iterator[bool]:
        """Keep the transfer from ending meanwhile; False where it has ended already.

        After its end the engine's memory is the engine's again: a copy from there that begins, or
        counts, later would take whatever is in it by then.
        """
        with self._lock:
            yield not self.transfer.wait_finished(0)

    def add_extra(self, step: Step) -> None:
        """Take in a job that the transfer waits for until its deadline, but does not depend on."""
        with self._lock:
            self._extras.append(step)
            self._moving[step.job.id] = step.job

    def extra_over(self, job: MovingJob) -> None:
        """Forget such a job, and go on; harmless to repeat."""
        with self._lock:
            self._extras = [step for step in self._extras if step.job is not job]
            if job.is_quiesced():
                self._moving.pop(job.id, None)
        self.pump()

    def wait_layer(self, layer: int, timeout_s: float | None) -> int:
        """See `Transfer.wait_layer`."""
        if self.arrival is None:
            self.transfer.wait(timeout_s)
        elif not self.arrival.wait(layer, self.remaining_s() + _WAIT_SLICE_S, timeout_s):
            if timeout_s is not None and timeout_s < self.remaining_s():
                raise TransferTimeout(f"layer {layer} has not arrived after {timeout_s} s")
            self.pump()
        if self.transfer.wait_finished(0):
            return self.transfer.wait().prefix_blocks
        assert self.arrival is not None, "without one the transfer has ended"
        return self.arrival.prefix_blocks(self.reasons)

    def wait_quiesced(self, timeout_s: float) -> bool:
        """See `Transfer.wait_quiesced`.

        What a disk or the network still does to slots is not waited for: those stay reserved until
        their step is settled. No copy from or to the blocks begins once the transfer has ended.
        """
        end = time.monotonic() + timeout_s
        while not self.transfer.wait_finished(0):
            if time.monotonic() >= end:
                return False
            self.drive(max(0.0, end - time.monotonic()))
        with self._lock:
            jobs = list(self._moving.values())
        for job in jobs:
            if not job.wait_at_rest(max(0.0, end - time.monotonic())):
                return False
        with self._lock:
            self._moving.clear()
        return True

    def wait_on_stream(self, stream: int, layer: int | None) -> None:
        """See `Transfer.wait_on_stream`."""
        if self.arrival is None:
            raise UsageError("the transfer does not touch device memory: wait for it on the CPU")
        self.arrival.wait_on(stream, layer)

    def step_over(self, step_job: MovingJob) -> None:
        """Forget a settled job and go on; every settle ends with this."""
        with self._lock:
            self._steps = [step for step in self._steps if step.job is not step_job]
            self._moving.pop(step_job.id, None)
        self.pump()

    def give_up(self, job: MovingJob) -> None:
        """End the transfer although a job's bytes may still move; its `settle` comes later."""
        with self._lock:
            self._steps = [step for step in self._steps if step.job is not job]
            if job.state() == "cancelled":
                self.cancel()
            else:
                self._time_out()

    def remaining_s(self) -> float:
        """Return the seconds left until the deadline."""
        return max(0.0, self._end - time.monotonic())

    def _time_out(self) -> None:
        self._end_early(
            TransferTimeout(
                f"{self.verb} did not finish within its deadline of {self._deadline_s} s: "
                f"{int((self.reasons == MissReason.HIT).sum())} of {len(self.reasons)} blocks "
                "arrived; raise deadline_s, or see which tier is slow in the metrics",
                bytes_done=self.bytes_done,
            )
        )

    def _end_early(self, error: KvxError) -> None:
        with self._lock:
            if self._ended_by is not None or self.transfer.wait_finished(0):
                return
            self._ended_by = error
            steps = self._steps + self._extras
            # First of all: whoever sees the transfer ended may reuse its source at once, and a copy
            # that goes on from there must not count as arrived.
            for step in steps:
                step.job.cancel()
            is_cancel = isinstance(error, TransferCancelled)
            left = self.reasons == PENDING
            self.reasons[left] = MissReason.CANCELLED if is_cancel else MissReason.DEADLINE
            if not is_cancel and not self._steps and self._retry_s > _RETRY_MIN_S:
                # Nothing was under way: all the time went into looking for room.
                self.reasons[self.waiting] = MissReason.NO_ROOM
            self.waiting = self.waiting[:0]
            self._finish()

    def _refuse_all(self, reason: MissReason) -> None:
        """Give every row its reason before anything has begun."""
        self.reasons[:] = reason
        self.waiting = self.waiting[:0]

    def _settle_reason(self, rows: npt.NDArray[np.int64], reasons: npt.NDArray[np.uint8]) -> None:
        """Record outcomes of rows; after an early end they come too late and are dropped."""
        with self._lock:
            if self._ended_by is None:
                self.reasons[rows] = reasons

    def _finish(self) -> None:
        result = TransferResult(
            self.reasons.copy(), self.tiers.copy(), self.bytes_done, time.monotonic() - self._began
        )
        is_first = self.transfer.complete(result, self._ended_by)
        if self.arrival is not None:
            self.arrival.finish()
        if is_first:
            self.shared.instruments.note_transfer(self.verb, result, self._ended_by)

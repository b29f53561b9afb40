"""The one background thread of a cache: it settles native jobs and runs timers.

A job is settled exactly once, after its bytes have physically stopped (it is "quiesced"): only then
may its slots be committed, unpinned or reused. A job whose deadline passed is given up first, so
that its transfer ends on time, and settled whenever the hardware lets go.
"""

from __future__ import annotations

import heapq
import itertools
import logging
import threading
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from collections.abc import Callable

    import numpy as np
    import numpy.typing as npt

    from kvx_ext import _core

_log = logging.getLogger(__name__)
_COMPLETIONS_MAX = 256
_IDLE_S = 1.0
_LEFT_TO_WAITER_S = 0.005
# Between looks at a job of somebody else that has ended and still moves bytes.
_NOT_QUIET_S = 0.005
# States of a job that has come to its own end, rather than being ended.
_OUTCOMES = ("done", "failed")


class MovingJob(Protocol):
    """What a step needs of a job: the engine's own, or one that fetches from a peer."""

    @property
    def id(self) -> int:
        """Number of the job; those of the engine are positive, those of others negative."""

    def state(self) -> str:
        """Return ``running``, ``done``, ``failed``, ``timed_out`` or ``cancelled``."""

    def is_terminal(self) -> bool:
        """Return whether the results are final."""

    def is_quiesced(self) -> bool:
        """Return whether nothing touches the memory any more."""

    def wait(self, timeout_s: float) -> bool:
        """Wait until terminal; False when time was up first."""

    def wait_quiesced(self, timeout_s: float) -> bool:
        """Wait until quiesced; False when time was up first."""

    def cancel(self) -> bool:
        """Ask to end it; False when it had ended. Never blocks."""

    def codes(self) -> npt.NDArray[np.int32]:
        """Return the outcome of every block, `kvx.transfer.codes.Code`; -1 while undecided."""

    def errnos(self) -> npt.NDArray[np.int32]:
        """Return the errno behind a storage code of every block."""


@dataclass(slots=True, eq=False)
class Step:
    """A native job and what to do with its outcome.

    Attributes:
        job: The job.
        settle: Called once, after the bytes have stopped.
        give_up: Called once if the job ends while bytes still move; before `settle`.
        keep: Whatever the bytes live in: held until settled.
        is_window: Whether it is one of the few that an operation has under way at a time.
    """

    job: MovingJob
    settle: Callable[[MovingJob], None]
    give_up: Callable[[MovingJob], None]
    keep: object = None
    is_window: bool = True
    lock: threading.Lock = field(default_factory=threading.Lock)
    num_waiters: int = 0
    is_given_up: bool = False
    is_settled: bool = False

    def wait(self, timeout_s: float) -> bool:
        """Wait for the job and settle it on this thread; True if that was done here and now.

        While somebody waits the reactor leaves the job to them: two threads that settle in turn
        would fight for the interpreter lock.
        """
        with self.lock:
            self.num_waiters += 1
        try:
            self.job.wait(timeout_s)
        finally:
            with self.lock:
                self.num_waiters -= 1
        was_settled = self.is_settled
        return self.advance() and not was_settled

    def advance(self) -> bool:
        """Do what the job's state calls for; True once settled. Any thread, any number of times."""
        if not self.job.is_terminal():
            return False
        if not self.job.is_quiesced():
            if self.job.state() in _OUTCOMES:
                return False  # its last copy is just letting go; that is announced, too
            with self.lock:
                first = not (self.is_given_up or self.is_settled)
                self.is_given_up = True
            if first:
                self.give_up(self.job)
            return False
        with self.lock:
            first = not self.is_settled
            self.is_settled = True
        if first:
            self.settle(self.job)
            self.keep = None
        return True


class Reactor:
    """Settles the jobs of one engine and runs its timers, on one daemon thread."""

    def __init__(self, engine: _core.Engine) -> None:
        """Make it; `start` starts the thread."""
        self._engine = engine
        self._lock = threading.Lock()
        self._steps: dict[int, Step] = {}
        self._timers: list[tuple[float, int, Callable[[], None]]] = []
        self._order = itertools.count()
        self._is_closing = False
        self._must_stop = False
        self._thread = threading.Thread(target=self._run, name="kvx-reactor", daemon=True)

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def submit(self, make: Callable[[], Step]) -> Step:
        """Submit a job so that its completion cannot be seen before its step is known.

        Args:
            make: Submits the job to the engine and wraps it; must not block.
        """
        with self._lock:
            step = make()
            self._steps[step.job.id] = step
        return step

    def adopt(self, step: Step) -> None:
        """Take in a step of somebody else's job; `ended` must follow from whoever runs that."""
        with self._lock:
            self._steps[step.job.id] = step

    def ended(self, job_id: int) -> None:
        """Settle the step of an adopted job that has become terminal; on any thread."""
        self.call_later(0.0, lambda: self._settle_job(job_id))

    def call_later(self, delay_s: float, callback: Callable[[], None]) -> None:
        """Run `callback` on the reactor's thread after `delay_s`, at most one idle turn late."""
        with self._lock:
            due = time.monotonic() + delay_s
            heapq.heappush(self._timers, (due, next(self._order), callback))
            is_next = self._timers[0][0] == due
        if is_next:
            self._engine.wake()

    @property
    def num_unsettled(self) -> int:
        """Jobs whose bytes may still move."""
        with self._lock:
            return len(self._steps)

    def close(self, timeout_s: float) -> None:
        """Stop the thread once all jobs are settled or the time is up."""
        end = time.monotonic() + timeout_s
        self._is_closing = True
        self._engine.wake()
        if not self._thread.is_alive() or self._thread is threading.current_thread():
            return
        self._thread.join(max(0.0, end - time.monotonic()))
        self._must_stop = True
        self._engine.wake()
        self._thread.join(_IDLE_S)

    def _run(self) -> None:
        while True:
            ids, _ = self._engine.next_completions(_COMPLETIONS_MAX, self._idle_s())
            # In functions of their own: a name left over here would keep its cache alive.
            for job_id in ids.tolist():
                self._settle_job(job_id)
            self._run_timers()
            if self._is_closing and (self.num_unsettled == 0 or self._must_stop):
                return

    def _settle_job(self, job_id: int) -> None:
        with self._lock:
            step = self._steps.get(job_id)
        if step is not None:
            self._settle(step)

    def _settle(self, step: Step) -> None:
        """Settle a job that ended, unless somebody waits for it: then look again soon."""
        if step.num_waiters > 0 and not step.is_settled:
            self.call_later(_LEFT_TO_WAITER_S, lambda: self._settle(step))
            return
        try:
            is_settled = step.advance()
        except Exception:  # noqa: BLE001 - see the comment
            # Its transfer ends by its deadline; the thread must go on for all the others.
            _log.exception("settling job %d failed", step.job.id)
            is_settled = True
        if is_settled:
            with self._lock:
                self._steps.pop(step.job.id, None)
        elif step.job.id < 0:
            # Nobody announces when it has quiesced.
            self.call_later(_NOT_QUIET_S, lambda: self._settle(step))

    def _idle_s(self) -> float:
        with self._lock:
            if not self._timers:
                return _IDLE_S
            return min(_IDLE_S, max(0.0, self._timers[0][0] - time.monotonic()))

    def _run_timers(self) -> None:
        # Only what is due by now: timers that set themselves again must not keep jobs waiting.
        now = time.monotonic()
        while True:
            with self._lock:
                if not self._timers or self._timers[0][0] > now:
                    return
                _, _, callback = heapq.heappop(self._timers)
            try:
                callback()
            except Exception:  # noqa: BLE001 - see the comment
                # The thread settles everybody's jobs: one failing timer must not end it.
                _log.exception("a timer of the cache failed")

"""One transfer from its beginning to the moment when nothing of it is left.

    read   post -> arrived -> verified -> Finish -> the owner says that the lease is live: done
    write  Begin -> the owner holds its memory -> post -> arrived -> checksums told -> Finish -> the
           owner has compared them: done

The pump's thread drives it by `step`; the verifier and the peer's answers report to it. A small one
is moved and verified by whoever could begin: handing it on would take longer than that.
"""

from __future__ import annotations

import functools
import logging
import threading
from typing import TYPE_CHECKING

from kvx.errors import PeerLost
from kvx.transfer.backends.fields import numbers_of
from kvx.transfer.backends.nixl.bindings import Progress
from kvx.transfer.backends.nixl.checking import checks_of, checksums_of
from kvx.transfer.backends.nixl.messages import CHECK_BLOCKS_MAX, Begin, Finish
from kvx.transfer.codes import Code

if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Protocol

    from kvx.transfer.backend import LinkRequest
    from kvx.transfer.backends.nixl.job import NixlJob
    from kvx.transfer.backends.nixl.messages import Answer, Check, Message
    from kvx.transfer.backends.nixl.prepared import Flight
    from kvx.transfer.backends.nixl.rows import Batch

    class Surroundings(Protocol):
        """What a course needs of its channel."""

        def send(self, message: Message) -> None:
            """Send to the peer's endpoint; PeerLost when there is no connection."""

        def verify(self, work: Callable[[], None]) -> None:
            """Have the verifier's thread do something."""

        def wake(self) -> None:
            """Make the pump look again."""

        def lose(self, reason: str) -> None:
            """Take note that the peer is gone."""

        def say_over(self, job: int) -> None:
            """Tell the owner, now or later, that it may have its memory back."""

        def settled(self, course: Course) -> None:
            """Forget a course."""


_log = logging.getLogger(__name__)
_CODES = {int(code): code for code in Code}
# What moves and is verified in less time than it takes to wake a thread.
_SMALL_BYTES = 64 << 10


class Course:
    """A transfer under way."""

    def __init__(
        self, job: NixlJob, request: LinkRequest, around: Surroundings, *, is_verifying: bool
    ) -> None:
        """Do nothing yet; `start` it with a flight."""
        self.job = job
        self.request = request
        self._around = around
        self._is_verifying = is_verifying
        self._is_small = False
        self._check: Check | None = None  # of a small one, to go with Finish
        self._stepping = threading.Lock()
        self._lock = threading.Lock()
        self._flight: Flight | None = None
        self._may_post = False
        self._moved = 0  # batches
        self._verified = 0  # batches
        self._batches = 0
        self._owner_knows = False  # and waits for Finish or Over
        self._has_finished = False
        self.is_over = False

    @property
    def region(self) -> int:
        """The peer's region that it touches."""
        return self.request.plan.remote_region

    @property
    def is_moving(self) -> bool:
        """Whether NIXL has work of a transfer that has not ended."""
        flight = self._flight
        return flight is not None and flight.is_under_way and not self.job.is_terminal()

    @property
    def is_in_quarantine(self) -> bool:
        """Whether it has ended and its memory may be touched still."""
        return self.job.is_terminal() and not self.job.is_quiesced()

    def start(self, flight: Flight, batches: int) -> None:
        """Begin to move; a write waits for the owner's word first.

        Raises:
            PeerLost: There is no connection to ask over.
        """
        is_one = batches == 1 and self.job.blocks <= CHECK_BLOCKS_MAX
        self._is_small = is_one and self.job.bytes <= _SMALL_BYTES
        if self.request.is_write:
            self._owner_knows = True
            self._around.send(Begin(self.job.id, numbers_of(self.request.lease)))
        with self._lock:
            self._batches = batches
            self._flight = flight
            self._may_post = self._may_post or not self.request.is_write
        if self._is_small and not self.request.is_write:
            self.step()
        else:
            self._around.wake()

    def answered(self, answer: Answer) -> None:
        """Take the owner's answer to Begin or Finish."""
        code = _CODES.get(answer.code, Code.USAGE)
        if answer.text:
            _log.info("transfer %d: %s", self.job.id, answer.text)
        if answer.is_finish:
            self._owner_knows = False
            is_known = all(number < self.job.blocks for number in answer.failures)
            self.job.conclude(code if is_known else Code.CORRUPT, answer.failures)
        elif code is Code.OK:
            with self._lock:
                self._may_post = True
            if self._is_small:
                self.step()
        else:
            self._owner_knows = False
            self.job.end(code)
        self._around.wake()

    def step(self) -> bool:
        """Do what can be done now; returns whether anything was."""
        with self._stepping:
            try:
                return self._step()
            except Exception:  # noqa: BLE001 - logged; the thread drives other transfers too
                _log.exception("transfer %d is given up", self.job.id)
                self.job.cancel()
                return False

    def _step(self) -> bool:
        self.job.expire()
        with self._lock:
            flight, may_post = self._flight, self._may_post
        arrived: list[Batch] = []
        if flight is not None:
            arrived = flight.poll()
            if may_post and not self.job.is_terminal():
                batch = flight.post()
                arrived.extend([batch] if batch is not None else [])
            self._look_for_failure(flight)
        for batch in arrived:
            self._moved += 1
            if self._is_small:
                self._verify(batch)
            else:
                self._around.verify(functools.partial(self._verify, batch))
        if not self.job.is_terminal():
            return self._finish_when_verified() or bool(arrived)
        return self._settle_when_still() or bool(arrived)

    def _look_for_failure(self, flight: Flight) -> None:
        if flight.failure is Progress.LOST:
            self._around.lose("NIXL lost its connection")
        if flight.failure is not None:
            is_lost = flight.failure is Progress.LOST
            self.job.end(Code.PEER_LOST if is_lost else Code.UNAVAILABLE)

    def _verify(self, batch: Batch) -> None:
        """Compare a batch with what is expected, and tell its owner."""
        plan = self.request.plan
        try:
            if self._is_verifying and not self.job.is_terminal():
                part = slice(batch.first, batch.end)
                keys = None if plan.keys is None else plan.keys[part]
                sums = checksums_of(plan.memory, plan.local[part], keys)
                expected = None if plan.checksums is None else plan.checksums[part]
                self.job.note_checksums(batch.first, sums, expected)
                if self.request.is_write or plan.checksums is None:
                    self._owner_knows = True
                    for check in checks_of(self.request, self.job.id, batch.first, sums):
                        self._tell(check)
        except PeerLost as error:
            self._around.lose(str(error))
        except Exception:  # noqa: BLE001 - logged; what was not verified must not count
            _log.exception("transfer %d could not be verified", self.job.id)
            self.job.end(Code.CORRUPT)
        finally:
            with self._lock:
                self._verified += 1
            if not self._is_small:
                self._around.wake()

    def _tell(self, check: Check) -> None:
        if self._is_small:
            self._check = check
        else:
            self._around.send(check)

    def _finish_when_verified(self) -> bool:
        with self._lock:
            is_ready = 0 < self._batches == self._verified and not self._has_finished
            self._has_finished = self._has_finished or is_ready
        if is_ready:
            request = self.request
            lease = numbers_of(request.lease)
            word = Finish(self.job.id, lease, request.is_write, request.note, self._check)
            try:
                self._around.send(word)
            except PeerLost as error:
                self._around.lose(str(error))
        return is_ready

    def _settle_when_still(self) -> bool:
        """Say good-bye once nothing touches the memory any more."""
        flight = self._flight
        with self._lock:
            is_still = self._moved == self._verified
        if self.is_over or not is_still or (flight is not None and flight.is_under_way):
            return False
        self.is_over = True
        if flight is not None:
            flight.land()
        if self._owner_knows:
            self._around.say_over(self.job.id)
        self._around.settled(self)
        self.job.settle()
        return True

"""A write of ours: the receiver copies out of our memory, and says how far it came.

Whatever happens to the job, the receiver may go on copying until it has said otherwise, or is dead;
until then the write is in quarantine, and the receiver is asked to end it each time it can be
reached again.
"""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

import numpy as np

from kvx.errors import KvxError
from kvx.transfer.backends.device import messages
from kvx.transfer.backends.device.messages import WRITE_BLOCKS_MAX, Cancel, Done, Write
from kvx.transfer.backends.fields import numbers_of
from kvx.transfer.codes import Code

if TYPE_CHECKING:
    from collections.abc import Callable

    from kvx.transfer.backend import LinkRequest
    from kvx.transfer.backends.device.job import DeviceJob
    from kvx.transfer.core import LeaseRef

_CODES = {int(code) for code in Code}


class Outgoing:
    """One write, in parts that are each a message. Thread-safe."""

    def __init__(
        self, job: DeviceJob, request: LinkRequest, own: LeaseRef, *, life: int,
        send: Callable[[messages.Message], None], over: Callable[[Outgoing], None],
        was_cancelled: Callable[[DeviceJob], None],
        soon: Callable[[Callable[[], None]], None],
    ) -> None:  # fmt: skip
        """Get ready; `begin` tells the receiver.

        Args:
            job: Told of all that happens.
            request: What was asked for.
            own: Lease of ours that the receiver copies under.
            life: Our incarnation.
            send: To the receiver; PeerLost when there is no connection.
            over: Called once the receiver is known to be through.
            was_cancelled: Called when the receiver was asked to end: it may not answer.
            soon: Has a method of this called in a while.
        """
        self.job = job
        self._request = request
        self._own = own
        self._life = life
        self._send = send
        self._over = over
        self._was_cancelled = was_cancelled
        self._soon = soon
        self._lock = threading.Lock()
        self._pending: dict[int, tuple[int, int]] = {}
        self._has_begun = False
        self._is_over = False
        self._is_lost = False
        self._is_cancelled = False
        job.when_ended = self.ask_to_end
        job.ask_cancel = self._cancel

    def begin(self, numbers: Callable[[Outgoing], int]) -> None:
        """Tell the receiver what to copy.

        Args:
            numbers: Returns a fresh number by which answers find this write.
        """
        count = len(self._request.plan.local)
        starts = range(0, count, WRITE_BLOCKS_MAX)
        parts = {numbers(self): (start, min(start + WRITE_BLOCKS_MAX, count)) for start in starts}
        with self._lock:
            if self._is_over or self.job.is_terminal():
                parts = {}
            self._pending = dict(parts)
            self._has_begun = True
        try:
            for number, (start, stop) in parts.items():
                self._send(self._word(number, start, stop))
        except KvxError:
            self.lose(is_dead=False)
        if not parts:
            self._end()

    def answered(self, word: Done) -> None:
        """Take what the receiver says of a part."""
        with self._lock:
            part = self._pending.pop(word.number, None)
            is_last = not self._pending
        if part is None:
            return
        start, stop = part
        codes = self._codes_of(word, stop - start)
        sums = messages.column(word.checksums, "<u8", stop - start, "checksums")
        if word.text:
            self.job.explain(word.text)
        self.job.decide(start, codes, None if sums is None else sums.astype(np.uint64))
        if is_last:
            self._conclude()

    def ask_to_end(self) -> None:
        """Ask the receiver to end what it has not answered."""
        with self._lock:
            numbers = list(self._pending)
            has_begun = self._has_begun
        if not has_begun:
            self._end()
            return
        for number in numbers:
            try:
                self._send(Cancel(number))
            except KvxError:
                return

    def lose(self, *, is_dead: bool) -> None:
        """Take it that the receiver cannot be reached; if it is dead, it copies nothing more."""
        self.job.end(Code.PEER_LOST)
        if is_dead:
            self._end()
        elif not self._is_lost:
            self._is_lost = True
            self._soon(self.ask_again)

    def ask_again(self) -> None:
        """Ask a receiver that was lost until it answers or is known to be dead."""
        if not self._is_over:
            self.ask_to_end()
            self._soon(self.ask_again)

    def _cancel(self) -> None:
        self._is_cancelled = True
        self._was_cancelled(self.job)
        self.ask_to_end()

    def _conclude(self) -> None:
        self.job.conclude(is_cancelled=self._is_cancelled)
        self._end()

    def _end(self) -> None:
        with self._lock:
            if self._is_over:
                return
            self._is_over = True
        self._over(self)
        self.job.settle()

    def _codes_of(self, word: Done, count: int) -> np.ndarray:
        codes = messages.column(word.codes, "<i4", count, "codes")
        if codes is None:
            # Of the whole: OK would be said of blocks.
            whole = word.code if word.code in _CODES and word.code != Code.OK else Code.USAGE
            return np.full(count, whole, np.int32)
        known = np.isin(codes, list(_CODES))
        return np.where(known, codes, np.int32(Code.DEVICE)).astype(np.int32)

    def _word(self, number: int, start: int, stop: int) -> Write:
        plan, part = self._request.plan, slice(start, stop)
        return Write(
            number=number,
            life=self._life,
            deadline_ms=max(1, round(self._request.deadline_s * 1e3)),
            lease=numbers_of(self._request.lease),
            rows=plan.remote[part].astype("<i8").tobytes(),
            indices=b"" if plan.indices is None else plan.indices[part].astype("<u4").tobytes(),
            source_lease=numbers_of(self._own),
            source_region=plan.memory.region,
            source_first=start,
            source_rows=plan.local[part].astype("<i8").tobytes(),
            keys=b"" if plan.keys is None else plan.keys[part].tobytes(),
        )

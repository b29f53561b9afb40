"""The owner's side: what peers do to memory of ours through NIXL, and whether it was in order.

NIXL lets a peer write into registered memory without asking, and cannot be made to stop. So a write
is announced, and its lease is held from then until the peer says that it is through, or is dead:
meanwhile nobody else is given that memory, however long ago the lease has expired. A read is held
against nothing: whoever reads learns at the end whether the lease was live all the time.
"""

from __future__ import annotations

import logging
import threading
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from kvx.errors import KvxError, PeerLost, StaleReference, UsageError
from kvx.transfer.backend import REMOTE_WRITE
from kvx.transfer.backends.fields import lease_of, text_of
from kvx.transfer.backends.nixl.checking import disagreeing
from kvx.transfer.backends.nixl.messages import FAILURES_MAX, Answer
from kvx.transfer.codes import Code

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from kvx.transfer.backend import BackendHost, LeaseUse, Memory
    from kvx.transfer.backends.nixl.messages import Begin, Check, Finish, Message

_log = logging.getLogger(__name__)
_READ, _WRITE = 1, 2
# Of one peer at a time; each costs a few hundred bytes.
_WORKS_MAX = 65_536


@dataclass(slots=True)
class _Work:
    """A transfer of a peer, as far as its owner knows."""

    life: str
    use: LeaseUse | None = None
    failures: list[int] = field(default_factory=list)
    error: tuple[Code, str] | None = None


class Owner:
    """Answers for the memory of this agent. Thread-safe."""

    def __init__(
        self,
        host: BackendHost,
        memory_of: Callable[[int], Memory | None],
        send: Callable[[str, Message], None],
    ) -> None:
        """Own nothing yet.

        Args:
            host: The agent.
            memory_of: Finds registered memory by the number of its region.
            send: Sends to the endpoint of a peer; PeerLost when there is no connection.
        """
        self._host = host
        self._memory_of = memory_of
        self._send = send
        self._lock = threading.Lock()
        self._works: dict[tuple[str, int], _Work] = {}

    def begin(self, peer: str, life: str, word: Begin) -> None:
        """Hold a lease for a write."""
        code, text = Code.OK, ""
        try:
            use = self._host.use_lease(peer, lease_of(word.lease), _WRITE | REMOTE_WRITE)
        except KvxError as error:
            code, text = _code_of(error), str(error)
        else:
            if not self._keep(peer, word.job, _Work(life, use)):
                use.end()
                code, text = Code.CAPACITY, "too many transfers of this peer have not ended"
        self._answer(peer, _answer(word.job, code, text, is_finish=False))

    def check(self, peer: str, life: str, word: Check) -> None:
        """Compare checksums of a peer with the bytes that are here; for the verifier's thread."""
        with self._lock:
            work = self._works.get((peer, word.job))
        if work is None:
            work = _Work(life)
            if word.is_write or not self._keep(peer, word.job, work):
                return  # never begun, or refused: Finish will find nothing and say so
        try:
            use = work.use or self._host.use_lease(peer, lease_of(word.lease), _READ)
            try:
                work.failures.extend(self._disagreeing(word, use))
            finally:
                if use is not work.use:
                    use.end()
        except KvxError as error:
            work.error = work.error or (_code_of(error), str(error))

    def finish(self, peer: str, life: str, word: Finish) -> None:
        """Judge a transfer whose bytes have moved; for the verifier's thread, behind its checks."""
        if word.check is not None:
            self.check(peer, life, word.check)
        with self._lock:
            work = self._works.pop((peer, word.job), None)
        code, text = self._judge(peer, word, work)
        failures = list(work.failures) if work is not None and code is Code.OK else []
        if len(failures) > FAILURES_MAX:
            code, failures, text = Code.CORRUPT, [], f"{len(failures)} blocks do not agree"
        if code is Code.OK and not failures and word.note:
            self._host.deliver(peer, word.note)
        if work is not None and work.use is not None:
            work.use.end()
        self._answer(peer, _answer(word.job, code, text, failures, is_finish=True))

    def over(self, peer: str, job: int) -> None:
        """Let go of what a failed transfer held."""
        with self._lock:
            work = self._works.pop((peer, job), None)
        if work is not None and work.use is not None:
            work.use.end()

    def buried(self, life: str) -> None:
        """Let go of all that a dead peer held."""
        with self._lock:
            dead = [key for key, work in self._works.items() if work.life == life]
            works = [self._works.pop(key) for key in dead]
        for work in works:
            if work.use is not None:
                work.use.end()

    def knows(self, life: str) -> bool:
        """Return whether a life of a peer has begun what it has not ended."""
        with self._lock:
            return any(work.life == life for work in self._works.values())

    def held(self) -> int:
        """Return the number of writes that peers have not ended."""
        with self._lock:
            return sum(work.use is not None for work in self._works.values())

    def _judge(self, peer: str, word: Finish, work: _Work | None) -> tuple[Code, str]:
        if work is not None and work.error is not None:
            return work.error
        if word.is_write:
            if work is None or work.use is None:
                return Code.STALE, "the write was never begun here"
            is_live = work.use.is_live()
            return (Code.OK, "") if is_live else (Code.STALE, "the lease ended during the write")
        try:
            self._host.use_lease(peer, lease_of(word.lease), _READ).end()
        except KvxError as error:
            return _code_of(error), str(error)
        return Code.OK, ""

    def _disagreeing(self, word: Check, use: LeaseUse) -> list[int]:
        memory = self._memory_of(use.region)
        if memory is None:
            raise StaleReference(f"region {use.region} is not registered any more")
        return disagreeing(word, use.blocks, memory)

    def _keep(self, peer: str, job: int, work: _Work) -> bool:
        with self._lock:
            is_free = (peer, job) not in self._works and len(self._works) < _WORKS_MAX
            if is_free:
                self._works[peer, job] = work
            return is_free

    def _answer(self, peer: str, answer: Answer) -> None:
        try:
            self._send(peer, answer)
        except PeerLost:
            # Its write is held until it comes back with Over, or is known to be dead.
            _log.debug("%s left before its answer", peer)


def _answer(
    job: int, code: Code, text: str, failures: Sequence[int] = (), *, is_finish: bool
) -> Answer:
    return Answer(job, is_finish, int(code), list(failures), text_of(text))


def _code_of(error: KvxError) -> Code:
    if isinstance(error, StaleReference):
        return Code.STALE
    return Code.USAGE if isinstance(error, UsageError) else Code.UNAVAILABLE

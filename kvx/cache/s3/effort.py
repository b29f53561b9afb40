"""How hard a call to an object store is tried, and for how long.

A call ends at its deadline, whatever the service, the network and the client do: what is under way
then is cancelled and not waited for. Until then transient failures are tried again after pauses
with decorrelated jitter; a read that takes longer than nearly all others is asked for a second time
and the first answer counts; requests under way are limited to what the service bears; an endpoint
that fails again and again is left alone (breaker), but for one probe at a time.

Time is the event loop's, so that tests can play it.
Sources: M. Brooker, "Exponential Backoff and Jitter", AWS Architecture Blog, 2015; J. Dean, L. A.
Barroso, "The Tail at Scale", CACM 56:2, 2013.
"""

from __future__ import annotations

import asyncio
import random
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, TypeVar

from kvx.cache.breaker import BreakerState, Passage
from kvx.cache.s3.concurrency import Concurrency
from kvx.cache.s3.pace import Pace
from kvx.cache.s3.store import ObjectError, ObjectFault

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from kvx.cache.breaker import Breaker

AnswerT = TypeVar("AnswerT")

_PAUSE_MIN_S = 0.02
_PAUSE_MAX_S = 1.0
_HEDGE_QUANTILE = 0.95
_HEDGE_EXTRA_S = 0.005
_HEDGE_SHARE = 0.05
_HEDGES_SAVED_MAX = 4.0
_CUT_HARD = 0.5
_CUT_SOFT = 0.9


class EffortInstruments(Protocol):
    """What is counted; called on the event loop, must not block."""

    def note_call(self, verb: str, seconds: float, fault: ObjectFault | None) -> None:
        """Count a call that has ended, waiting and retries included."""

    def note_attempt(self, verb: str, seconds: float, fault: ObjectFault | None) -> None:
        """Count one request that was answered, failed or ran out of time."""

    def note_retry(self, verb: str, fault: ObjectFault) -> None:
        """Count a request that is made again, by why."""

    def note_hedge(self, verb: str) -> None:
        """Count a second request."""

    def note_hedge_won(self, verb: str) -> None:
        """Count a second request that was answered first."""


@dataclass(frozen=True, slots=True)
class EffortStats:
    """How things stand.

    Attributes:
        in_flight: Requests under way.
        num_waiting: Calls that wait for a slot.
        limit: Most requests at a time, now.
        breaker: Whether the endpoint is asked at all.
        hedges_left: Second requests that may be made at once.
    """

    in_flight: int
    num_waiting: int
    limit: int
    breaker: BreakerState
    hedges_left: int


@dataclass(slots=True)
class _Trial:
    """One request; nothing is learnt any more from one that `is_over`, though it may still run."""

    verb: str
    pace: Pace
    passage: Passage
    begun_s: float
    is_over: bool = False


class Effort:
    """Tries calls to one endpoint; of one event loop, but for `stats`."""

    def __init__(
        self,
        breaker: Breaker,
        instruments: EffortInstruments,
        *,
        max_in_flight: int,
        patience_s: float = 1.0,
        rng: random.Random | None = None,
    ) -> None:
        """Begin with all slots and no idea of what is usual.

        Args:
            breaker: Of the endpoint.
            instruments: Where is counted.
            max_in_flight: Most requests at a time.
            patience_s: A request that was cut by its deadline sooner says nothing of the endpoint.
            rng: For the pauses.
        """
        self._breaker = breaker
        self._instruments = instruments
        self._slots = Concurrency(max_in_flight)
        self._patience_s = patience_s
        self._rng = rng or random.Random()
        self._paces: dict[tuple[str, int], Pace] = {}
        self._hedges_saved = 1.0
        self._last_outage = "it has just failed"

    def stats(self) -> EffortStats:
        """Return how things stand. Thread-safe."""
        return EffortStats(
            in_flight=self._slots.in_flight,
            num_waiting=self._slots.num_waiting,
            limit=self._slots.limit,
            breaker=self._breaker.state,
            hedges_left=int(self._hedges_saved),
        )

    async def call(
        self,
        verb: str,
        attempt: Callable[[], Awaitable[AnswerT]],
        *,
        ends_at: float,
        may_hedge: bool = False,
        size_bytes: int = 0,
    ) -> AnswerT:
        """Return what `attempt` does, in one of several tries.

        Args:
            verb: What it does: get, head, put, list or delete; calls of one are compared.
            attempt: Begins one request; cancelled when its answer is of no use any more.
            ends_at: When the call ends, by the loop's clock, which is `time.monotonic`.
            may_hedge: Whether a second request may be made beside a slow one.
            size_bytes: How much it moves: only calls of about the same size are compared.

        Raises:
            ObjectError: That of the last try; TIMEOUT at `ends_at`; AVOIDED, at once, while the
                breaker is open.
        """
        loop = asyncio.get_running_loop()
        begun_s = loop.time()
        try:
            answer = await self._insist(verb, attempt, ends_at, may_hedge, size_bytes)
        except ObjectError as error:
            self._instruments.note_call(verb, loop.time() - begun_s, error.fault)
            raise
        self._instruments.note_call(verb, loop.time() - begun_s, None)
        return answer

    async def _insist(
        self,
        verb: str,
        attempt: Callable[[], Awaitable[AnswerT]],
        ends_at: float,
        may_hedge: bool,  # noqa: FBT001 - as in call
        size_bytes: int,
    ) -> AnswerT:
        """Try until it works, cannot, or there is no time for another try."""
        loop = asyncio.get_running_loop()
        pace = self._paces.setdefault((verb, size_bytes.bit_length()), Pace())
        begun_s, pause_s = loop.time(), _PAUSE_MIN_S
        while True:
            passage = await self._enter(verb, begun_s, ends_at)
            try:
                return await self._race(
                    _Trial(verb, pace, passage, loop.time()), attempt, begun_s, ends_at,
                    may_hedge=may_hedge,
                )  # fmt: skip
            except ObjectError as error:
                pause_s = self._rng.uniform(_PAUSE_MIN_S, min(_PAUSE_MAX_S, pause_s * 3))
                is_last = loop.time() + pause_s >= ends_at or not self._breaker.allow()
                if not error.fault.is_transient or is_last:
                    raise
                self._instruments.note_retry(verb, error.fault)
            await asyncio.sleep(pause_s)

    async def _enter(self, verb: str, begun_s: float, ends_at: float) -> Passage:
        """Wait for a slot, and for nothing else; return how the breaker lets us pass."""
        if self._breaker.allow():
            is_late = asyncio.get_running_loop().time() >= ends_at
            if is_late or not await self._slots.acquire(ends_at):
                waited_s = max(0.0, ends_at - begun_s)
                raise ObjectError(
                    f"{verb}: not begun within {waited_s:.3f} s, as {self._slots.in_flight} others"
                    " are under way: the service is slow, or `max_in_flight` or `deadline_s` small",
                    fault=ObjectFault.TIMEOUT,
                )
            passage = self._breaker.enter()
            if passage is not Passage.REFUSED:
                return passage
            self._slots.release()
        raise ObjectError(
            f"{verb}: not tried, as the endpoint failed too often ({self._last_outage}); it is"
            f" tried again in {self._breaker.wait_s:.1f} s",
            fault=ObjectFault.AVOIDED,
        )

    async def _race(
        self,
        first: _Trial,
        attempt: Callable[[], Awaitable[AnswerT]],
        begun_s: float,
        ends_at: float,
        *,
        may_hedge: bool,
    ) -> AnswerT:
        """Make the request, and a second one when it takes long; return the first good answer."""
        loop = asyncio.get_running_loop()
        racing = {self._begin(first, attempt): first}
        hedge_at = self._hedge_at(first) if may_hedge else None
        try:
            while True:
                until = ends_at if hedge_at is None else min(hedge_at, ends_at)
                done, _ = await asyncio.wait(
                    racing, timeout=until - loop.time(), return_when=asyncio.FIRST_COMPLETED
                )
                for task in done:
                    trial = racing.pop(task)
                    if not self._is_worth_waiting(task, racing):
                        return self._finish(task, racing, is_hedge=trial is not first)
                if not done and until == ends_at:
                    raise self._lateness(first.verb, begun_s, racing)
                if not done and self._may_hedge():
                    second = _Trial(first.verb, first.pace, Passage.FREE, loop.time())
                    racing[self._begin(second, attempt)] = second
                    self._instruments.note_hedge(first.verb)
                hedge_at = None
        finally:
            for task, trial in racing.items():
                trial.is_over = True
                task.cancel()

    def _finish(
        self,
        task: asyncio.Future[AnswerT],
        losers: dict[asyncio.Future[AnswerT], _Trial],
        *,
        is_hedge: bool,
    ) -> AnswerT:
        """Return what the request brought that counts."""
        now_s = asyncio.get_running_loop().time()
        for loser in losers.values():
            if is_hedge and task.exception() is None:
                self._instruments.note_hedge_won(loser.verb)
            # It took at least that long; without it, hedges would breed hedges.
            loser.pace.note(now_s - loser.begun_s, now_s)
        return task.result()

    @staticmethod
    def _is_worth_waiting(
        task: asyncio.Future[AnswerT], racing: dict[asyncio.Future[AnswerT], _Trial]
    ) -> bool:
        """Return whether the other request may bring what this one did not."""
        error = task.exception()
        return bool(racing) and isinstance(error, ObjectError) and error.fault.is_transient

    def _lateness(
        self, verb: str, begun_s: float, racing: dict[asyncio.Future[AnswerT], _Trial]
    ) -> ObjectError:
        """Learn from requests that have run out of time."""
        now_s = asyncio.get_running_loop().time()
        for trial in racing.values():
            taken_s = now_s - trial.begun_s
            self._instruments.note_attempt(verb, taken_s, ObjectFault.TIMEOUT)
            self._slots.congested(_CUT_HARD, trial.begun_s, now_s)
            if taken_s >= self._patience_s:
                self._fail(f"{verb}: no answer within {taken_s:.3f} s")
        return ObjectError(
            f"{verb}: not done within {now_s - begun_s:.3f} s: the service is slow or does not"
            " answer; look at its load and at the network, or raise `deadline_s`",
            fault=ObjectFault.TIMEOUT,
        )

    def _hedge_at(self, first: _Trial) -> float | None:
        """Return when the first request has taken longer than nearly all; None not to ask."""
        self._hedges_saved = min(_HEDGES_SAVED_MAX, self._hedges_saved + _HEDGE_SHARE)
        usual_s = first.pace.quantile(_HEDGE_QUANTILE)
        return None if usual_s is None else first.begun_s + usual_s + _HEDGE_EXTRA_S

    def _may_hedge(self) -> bool:
        """Take a slot and a saved hedge, if there are: nobody waits for what hedges use.

        Probes are not hedged: while there is one, the breaker is not closed.
        """
        is_closed = self._breaker.state is BreakerState.CLOSED
        if self._hedges_saved < 1.0 or not is_closed or not self._slots.try_acquire():
            return False
        self._hedges_saved -= 1.0
        return True

    def _begin(
        self, trial: _Trial, attempt: Callable[[], Awaitable[AnswerT]]
    ) -> asyncio.Future[AnswerT]:
        """Begin a request in a slot that is taken; it gives the slot back when it has ended."""
        try:
            task = asyncio.ensure_future(attempt())
        except BaseException:
            self._leave(trial)
            raise
        task.add_done_callback(lambda ended: self._judge(trial, ended))
        return task

    def _leave(self, trial: _Trial) -> None:
        self._slots.release()
        if trial.passage is Passage.PROBE:
            self._breaker.end_probe()

    def _judge(self, trial: _Trial, task: asyncio.Future[AnswerT]) -> None:
        """Learn from a request that has ended."""
        error = None if task.cancelled() else task.exception()
        if not task.cancelled() and not trial.is_over:
            now_s = asyncio.get_running_loop().time()
            taken_s = now_s - trial.begun_s
            if error is None:
                self._instruments.note_attempt(trial.verb, taken_s, None)
                self._breaker.success()
                if trial.pace.note(taken_s, now_s):
                    self._slots.congested(_CUT_SOFT, trial.begun_s, now_s)
                else:
                    self._slots.worked()
            elif isinstance(error, ObjectError):
                self._instruments.note_attempt(trial.verb, taken_s, error.fault)
                self._blame(error, trial, now_s)
        self._leave(trial)

    def _blame(self, error: ObjectError, trial: _Trial, now_s: float) -> None:
        """Tell slots and breaker of a failure."""
        fault = error.fault
        was_one = self._slots.limit == 1
        if fault in {ObjectFault.THROTTLED, ObjectFault.TIMEOUT}:
            self._slots.congested(_CUT_HARD, trial.begun_s, now_s)
        if fault is ObjectFault.THROTTLED and not was_one:
            return  # fewer requests may be all it takes
        if fault.is_outage:
            self._fail(str(error))
        elif fault is not ObjectFault.CLOSED:
            self._breaker.success()
            self._slots.worked()

    def _fail(self, what: str) -> None:
        self._last_outage = what
        self._breaker.failure()

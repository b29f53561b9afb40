"""The way to one life of one peer: its plans, its transfers, and their end."""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from typing import TYPE_CHECKING

from kvx.buffers import MemoryKind
from kvx.errors import KvxError, PeerLost, UsageError
from kvx.transfer.backends.nixl.course import Course
from kvx.transfer.backends.nixl.job import NixlJob
from kvx.transfer.backends.nixl.prepared import Flight, Prepared
from kvx.transfer.backends.nixl.rows import totals
from kvx.transfer.codes import Code

if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Protocol

    from kvx.transfer.backend import LinkRequest, Memory
    from kvx.transfer.backends.nixl.bindings import NixlAgent
    from kvx.transfer.backends.nixl.messages import Answer, Message, Region
    from kvx.transfer.backends.nixl.options import NixlOptions
    from kvx.transfer.backends.nixl.pump import Pump, Verifier

    class Surroundings(Protocol):
        """What a channel needs of its endpoint."""

        nixl: NixlAgent
        options: NixlOptions
        pump: Pump
        verifier: Verifier

        def next_job(self) -> int:
            """Return a number for a job."""

        def ended(self, job: int) -> None:
            """Tell the agent of the end of a watched job."""

        def send(self, peer: str, message: Message) -> None:
            """Send to a peer's endpoint; PeerLost when there is no connection."""

        def say_over(self, peer: str, life: str, job: int) -> None:
            """Send Over, whichever way there is or when there is one again."""

        def ask_regions(self, peer: str) -> None:
            """Ask a peer what it has registered; PeerLost when there is no connection."""

        def maybe_forgotten(self, peer: str, region: int) -> None:
            """Tell a peer that it may have a region back, if no transfer touches it any more."""

        def is_registered(self, memory: Memory) -> bool:
            """Return whether memory of ours is registered."""

        def retired(self, channel: NixlChannel) -> None:
            """Take note that a channel is down and nothing of it is left."""


# Plans that are used again and again; NIXL keeps a few hundred bytes a run for each.
_PLANS_MAX = 64


class NixlChannel:
    """See `kvx.transfer.backend.Channel`. Thread-safe."""

    def __init__(
        self, peer: str, life: str, regions: dict[int, Region], around: Surroundings
    ) -> None:
        """Be up; NIXL knows the peer already.

        Args:
            peer: Its name.
            life: What NIXL calls it, another name after each restart.
            regions: What it has registered, by number.
            around: The endpoint.
        """
        self.peer = peer
        self.life = life
        self._around = around
        self._lock = threading.Lock()
        self._regions = regions
        self._courses: dict[int, Course] = {}
        self._waiting: list[Course] = []  # for the peer to say where their region is
        self._plans: OrderedDict[int, Prepared] = OrderedDict()
        self._leaving: set[int] = set()  # regions that the peer wants back
        self._down = ""

    def submit(self, request: LinkRequest) -> NixlJob:
        """Begin a transfer.

        Raises:
            UsageError: The plan's memory is not registered here, or its two sides do not fit.
            PeerLost: The channel is down.
            UnavailableError: NIXL refuses the plan, or its memory cannot be verified.
        """
        self._check(request)
        around = self._around
        sizes = totals(request.plan.local)
        job = NixlJob(
            around.next_job(),
            sizes,
            request.deadline_s,
            ended=around.ended,
            wake=around.pump.wake,
        )
        is_host = request.plan.memory.kind is MemoryKind.HOST
        course = Course(job, request, self, is_verifying=around.options.is_verifying and is_host)
        with self._lock:
            if self._down:
                raise PeerLost(f"{self.peer} is gone: {self._down}", peer=self.peer)
            is_known = course.region in self._regions
            if not is_known:
                self._waiting.append(course)
            self._courses[job.id] = course
        try:
            if is_known:
                self._start(course)
            else:
                around.ask_regions(self.peer)
        except BaseException:
            with self._lock:
                del self._courses[job.id]
                self._waiting = [one for one in self._waiting if one is not course]
            raise
        around.pump.add(course)
        return job

    def is_up(self) -> bool:
        """Return whether it can be used now."""
        return not self._down

    def close(self, timeout_s: float, code: Code = Code.PEER_LOST) -> None:
        """End what runs over it, and wait until NIXL is through with it.

        By default the peer has gone: nobody has cancelled anything.
        """
        self._go_down("the channel was closed", code)
        self.wait_idle(timeout_s)

    def wait_idle(self, timeout_s: float) -> bool:
        """Wait until nothing of any transfer is left; False when time was up first."""
        with self._lock:
            jobs = [course.job for course in self._courses.values()]
        return all(job.wait_quiesced(timeout_s) for job in jobs)

    # What follows is for the endpoint and for courses.

    def knows(self, regions: dict[int, Region]) -> None:
        """Learn what the peer has registered; begin what has waited for that."""
        with self._lock:
            self._regions = dict(regions)
            waiting, self._waiting = self._waiting, []
        for course in waiting:
            try:
                if course.region in self._regions:
                    self._start(course)
                else:
                    course.job.end(Code.STALE)
            except PeerLost:
                course.job.end(Code.PEER_LOST)
            except KvxError as error:
                is_usage = isinstance(error, UsageError)
                course.job.end(Code.USAGE if is_usage else Code.UNAVAILABLE)
            self.wake()

    def answered(self, answer: Answer) -> None:
        """Pass an answer on to its transfer."""
        with self._lock:
            course = self._courses.get(answer.job)
        if course is not None:
            course.answered(answer)

    def forget(self, region: int) -> None:
        """Use a region of the peer no more; `settled` tells it when that has come true."""
        with self._lock:
            self._regions.pop(region, None)
            self._leaving.add(region)
            stale = [key for key, one in self._plans.items() if one.region == region]
            plans = [self._plans.pop(key) for key in stale]
        for plan in plans:
            plan.release()

    def touches(self, region: int) -> bool:
        """Return whether a transfer touches a region of the peer."""
        with self._lock:
            return any(course.region == region for course in self._courses.values())

    def quarantine(self) -> list[tuple[int, str, bool, int, float]]:
        """Return what has ended while NIXL may still touch its memory; see `Quarantining`."""
        with self._lock:
            courses = [one for one in self._courses.values() if one.is_in_quarantine]
        now_ns = time.monotonic_ns()
        return [
            (
                one.job.id, self.peer, one.request.is_write, one.job.bytes,
                (now_ns - one.job.ended_ns) / 1e9,
            )
            for one in courses
        ]  # fmt: skip

    def drop_plans(self, memory: Memory) -> None:
        """Keep no plans over memory of ours that goes away."""
        with self._lock:
            stale = [key for key, one in self._plans.items() if one.memory.region == memory.region]
            plans = [self._plans.pop(key) for key in stale]
        for plan in plans:
            plan.release()

    def uses(self, memory: Memory) -> list[NixlJob]:
        """Return the transfers that touch memory of ours."""
        with self._lock:
            courses = list(self._courses.values())
        return [one.job for one in courses if one.request.plan.memory.region == memory.region]

    def send(self, message: Message) -> None:
        """Send to the peer's endpoint."""
        self._around.send(self.peer, message)

    def verify(self, work: Callable[[], None]) -> None:
        """Have the verifier's thread do something."""
        self._around.verifier.put(work)

    def wake(self) -> None:
        """Make the pump look again."""
        self._around.pump.wake()

    def say_over(self, job: int) -> None:
        """Tell the owner, now or later, that it may have its memory back."""
        self._around.say_over(self.peer, self.life, job)

    def lose(self, reason: str) -> None:
        """End all transfers; the peer cannot be reached."""
        self._go_down(reason, Code.PEER_LOST)

    def settled(self, course: Course) -> None:
        """Forget a transfer of which nothing is left."""
        with self._lock:
            self._courses.pop(course.job.id, None)
            is_leaving = course.region in self._leaving
        if is_leaving:
            self._around.maybe_forgotten(self.peer, course.region)
        self._retire_when_idle()

    def _check(self, request: LinkRequest) -> None:
        memory = request.plan.memory
        if not self._around.is_registered(memory):
            raise UsageError(f"region {memory.region} is not registered with NIXL")
        if memory.kind is not MemoryKind.HOST and request.plan.checksums is not None:
            raise UsageError(
                "checksums of device memory cannot be verified here: read into host memory, or "
                "lease the blocks without checksums"
            )

    def _start(self, course: Course) -> None:
        prepared = self._prepared(course.request)
        try:
            options = self._around.options
            flight = Flight(
                self._around.nixl,
                prepared,
                is_write=course.request.is_write,
                in_flight_max=options.batches_in_flight_max,
            )
        finally:
            prepared.release()
        try:
            course.start(flight, len(prepared.batches))
        except BaseException:
            flight.land()
            raise

    def _prepared(self, request: LinkRequest) -> Prepared:
        """Return the plan as NIXL knows it, held for the caller."""
        key = id(request.plan)  # unique while the plan is kept, and it is kept with its value
        with self._lock:
            known = self._plans.get(key)
            if known is not None:
                self._plans.move_to_end(key)
                known.hold()
                return known
            region = self._regions[request.plan.remote_region]
        batch_bytes = self._around.options.batch_bytes
        made = Prepared(self._around.nixl, self.life, request.plan, region, batch_bytes)
        made.hold()
        with self._lock:
            replaced = self._plans.pop(key, None)
            self._plans[key] = made
            oldest = self._plans.popitem(last=False)[1] if len(self._plans) > _PLANS_MAX else None
        for one in (replaced, oldest):
            if one is not None:
                one.release()
        return made

    def _go_down(self, reason: str, code: Code) -> None:
        with self._lock:
            if self._down:
                return
            self._down = reason
            courses = list(self._courses.values())
        for course in courses:
            course.job.end(code)
        self.wake()
        self._retire_when_idle()

    def _retire_when_idle(self) -> None:
        with self._lock:
            if not self._down or self._courses:
                return
            plans, self._plans = list(self._plans.values()), OrderedDict()
        for plan in plans:
            plan.release()
        self._around.retired(self)

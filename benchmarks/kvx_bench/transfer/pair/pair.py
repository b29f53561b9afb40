"""An initiator and a target, wherever they run: what is moved between them, and what it cost."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, Self

from kvx_bench.row import Sample
from kvx_bench.transfer.baselines.work import Work
from kvx_bench.transfer.pattern import CLEARED, Difference

if TYPE_CHECKING:
    from collections.abc import Callable

_NO_LIMIT_S = 600.0


class Desk(Protocol):
    """Where a side takes its requests."""

    def ask(self, **request: object) -> dict[str, Any]:
        """Have it done.

        Raises:
            KvxError: It went wrong.
        """


@dataclass(frozen=True, slots=True)
class Course:
    """What is run.

    Attributes:
        backend: The way.
        work: What is moved.
        has_checksums: Whether the owner of what is read computes checksums before, once; else, and
            of what is written, they are computed whenever a block is sent.
    """

    backend: str
    work: Work
    has_checksums: bool = False

    def shape(self) -> dict[str, Any]:
        """Return what requests say of it."""
        work = self.work
        return {
            "is_write": work.is_write, "block_bytes": work.block_bytes, "batch": work.batch,
            "backend": self.backend, "has_checksums": self.has_checksums and not work.is_write,
        }  # fmt: skip


@dataclass(frozen=True, slots=True)
class Burst:
    """Runs of a course right after each other.

    Attributes:
        wall_s: Of each, from the call to the end of the wait.
        post_s: Of each, until the submission came back.
        cpu_s: Of the initiator's process, all runs.
        target_cpu_s: Of the target's process.
    """

    wall_s: list[float]
    post_s: list[float]
    cpu_s: float
    target_cpu_s: float


class Begun:
    """A course that was leased and prepared.

    Attributes:
        prepare_s: What the initiator spent until its first submission came back.
        lease_s: What the target spent leasing, checksums included.
        token: The lease.
    """

    def __init__(self, pair: Pair, course: Course) -> None:
        shape = course.shape()
        self._pair = pair
        lease = pair.target.ask(do="lease", **shape)
        self.lease_s = float(lease["wall_s"])
        self._lease = lease["lease"]
        self.token = str(lease["token"])
        try:
            told = pair.initiator.ask(do="prepare", token=self.token, **shape)
        except BaseException:
            pair.target.ask(do="release", lease=self._lease)
            raise
        self.prepare_s = float(told["prepare_s"])
        self._course = told["course"]

    def burst(self, count: int, limit_s: float = _NO_LIMIT_S) -> Burst:
        """Run up to `count` times, and no more once `limit_s` have gone by."""
        ours, theirs = self._pair.cpu()
        told = self._pair.initiator.ask(do="run", course=self._course, count=count, limit_s=limit_s)
        ours_after, theirs_after = self._pair.cpu()
        return Burst(told["wall_s"], told["post_s"], ours_after - ours, theirs_after - theirs)

    def once(self) -> Sample:
        """Run once; the CPU seconds are those of both processes."""
        burst = self.burst(1)
        return Sample(burst.wall_s[0], burst.cpu_s + burst.target_cpu_s)

    def close(self) -> None:
        """Give the lease back."""
        self._pair.initiator.ask(do="forget", course=self._course)
        self._pair.target.ask(do="release", lease=self._lease)

    def __enter__(self) -> Self:
        """Nothing but what was begun."""
        return self

    def __exit__(self, *exception: object) -> None:
        """Give the lease back, unless one side is gone anyway."""
        if exception[0] is None:
            self.close()


class Pair:
    """Both sides, connected.

    Attributes:
        initiator: Takes requests for the side that acts.
        target: Takes requests for the side that owns the blocks.
        cpu: Returns the CPU seconds that the initiator's and the target's process have used.
    """

    def __init__(
        self,
        initiator: Desk,
        target: Desk,
        cpu: Callable[[], tuple[float, float]],
        made: contextlib.ExitStack | None = None,
    ) -> None:
        """Take two sides that are connected; `made` is closed with this."""
        self.initiator = initiator
        self.target = target
        self.cpu = cpu
        self._made = contextlib.ExitStack() if made is None else made

    def __enter__(self) -> Self:
        """Nothing but the pair."""
        return self

    def __exit__(self, *exception: object) -> None:
        """End both."""
        self.close()

    def close(self) -> None:
        """End both."""
        self._made.close()

    def map(self, num_bytes: int, kind: str = "host", target_kind: str = "host") -> None:
        """Give the initiator and the target memory to move.

        Raises:
            KvxError: There is none of that kind, or no way to move it.
        """
        self.target.ask(do="map", num_bytes=num_bytes, kind=target_kind)
        self.initiator.ask(do="map", num_bytes=num_bytes, kind=kind)

    def begin(self, course: Course) -> Begun:
        """Lease and prepare; runs once."""
        return Begun(self, course)

    def posts(self, work: Work, backend: str, count: int) -> tuple[list[float], list[float]]:
        """Return how long submitting takes: described anew each time, and prepared once."""
        course = Course(backend, work)
        with self.begin(course) as begun:
            told = self.initiator.ask(do="post", token=begun.token, count=count, **course.shape())
        return told["anew_s"], told["prepared_s"]

    def fill(self, work: Work, iteration: int) -> None:
        """Give the source the pattern of an iteration, and clear the other side."""
        source, sink = self._ends(work)
        shape = {"block_bytes": work.block_bytes, "batch": work.batch}
        source.ask(do="fill", iteration=iteration, **shape)
        sink.ask(do="fill", iteration=CLEARED, **shape)

    def look(self, work: Work, iteration: int) -> Difference | None:
        """Return the first byte that did not arrive."""
        sink = self._ends(work)[1]
        told = sink.ask(
            do="look", iteration=iteration, block_bytes=work.block_bytes, batch=work.batch
        )
        return None if told["difference"] is None else Difference(**told["difference"])

    def checked(self, course: Course, iteration: int) -> tuple[Difference | None, Burst, float]:
        """Move bytes that nobody has seen before, once, and look at every one of them.

        Returns the first one that is wrong, what the run took, and what preparing it took.
        """
        self.fill(course.work, iteration)
        # What was leased with checksums may not be written: so it is a lease of its own.
        with self.begin(course) as begun:
            sink = self._ends(course.work)[1]
            shape = {"block_bytes": course.work.block_bytes, "batch": course.work.batch}
            sink.ask(do="fill", iteration=CLEARED, **shape)
            burst = begun.burst(1)
        return self.look(course.work, iteration), burst, begun.prepare_s

    def _ends(self, work: Work) -> tuple[Desk, Desk]:
        """Return (source, sink) of the bytes."""
        both = (self.initiator, self.target)
        return both if work.is_write else both[::-1]

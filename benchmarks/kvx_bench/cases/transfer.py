"""Blocks from one process to another, beside everything else that could have moved them."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from kvx_bench.row import GB, Row
from kvx_bench.transfer.baselines.limits import TOP, Limits, limits_of
from kvx_bench.transfer.baselines.work import Work
from kvx_bench.transfer.contest import hold
from kvx_bench.transfer.kvx_pairs import KvxPairs, Way
from kvx_bench.transfer.overheads import idle_rows, post_rows, post_work, round_trip_rows
from kvx_bench.transfer.pair.pair import Begun, Course, Pair
from kvx_bench.transfer.sizes import size_name

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from kvx_bench.case import Options
    from kvx_bench.row import Sample
    from kvx_bench.transfer.baselines.work import Baseline

# By bytes of a block, how many: more than a cache holds, and fewer of those that take longest.
BATCHES = {4 << 10: 16384, 64 << 10: 4096, 2 << 20: 256}
_QUICK_BYTES_MAX = 16 << 20
# Fewer and the median is not worth much beside a second process.
_ROUNDS_MIN = 5
_ROUND_TRIPS = 5000
_POSTS = 50
_IDLE_S = 10.0


class TransferCase:
    """Reads and writes of whole batches between two processes of this host."""

    name = "transfer"
    description = "blocks from one process to another"

    def why_not(self, _options: Options) -> str:
        """It runs everywhere."""
        return ""

    def run(self, options: Options) -> Iterator[Row]:
        """Everything of one size in turn, round after round."""
        works = _works(is_quick=options.is_quick)
        num_bytes = max(post_work().num_bytes, *(work.num_bytes for work in works))
        fewer = 5 if options.is_quick else 1
        with (
            Limits(num_bytes, nixl_python=options.nixl_python) as limits,
            KvxPairs(num_bytes, driver=options.driver, nixl_python=options.nixl_python) as pairs,
        ):
            for work in works:
                yield from _rows(limits, pairs, work, max(_ROUNDS_MIN, options.repeats))
            yield from post_rows(pairs, limits, _POSTS // fewer)
            yield from round_trip_rows(pairs, limits, _ROUND_TRIPS // fewer)
            yield from idle_rows(pairs, limits, _IDLE_S / fewer)
            for absent in limits.absent:
                yield Row(
                    f"transfer.baseline.{absent.name}", note=f"not here because {absent.reason}"
                )
            for absent in pairs.absent:
                yield Row(f"transfer.{absent.name}", note=f"not here because {absent.reason}")


def _works(*, is_quick: bool) -> list[Work]:
    return [
        Work(is_write, size, min(batch, _QUICK_BYTES_MAX // size) if is_quick else batch)
        for size, batch in BATCHES.items()
        for is_write in (False, True)
    ]


@dataclass(frozen=True, slots=True)
class _Entrant:
    """A way of kvx that takes part.

    Attributes:
        way: It.
        pair: Its agents.
        course: What it runs.
        begun: The same, leased and prepared.
    """

    way: Way
    pair: Pair
    course: Course
    begun: Begun

    @property
    def is_unknown(self) -> bool:
        """Whether checksums are computed while sending although they could be known."""
        return not self.course.has_checksums and not self.course.work.is_write

    @property
    def name(self) -> str:
        """As a contestant, and what follows the size in its key."""
        return self.way.name + self.suffix

    @property
    def suffix(self) -> str:
        """What follows the size in its key."""
        return self.way.variant + (".sums-unknown" if self.is_unknown else "")

    @property
    def key(self) -> str:
        """Of its row."""
        work = self.course.work
        size = size_name(work.block_bytes)
        return f"transfer.{self.way.backend}.{work.operation}.{size}{self.suffix}"

    @property
    def note(self) -> str:
        """What its row must say."""
        work = self.course.work
        parts = [f"{work.batch} blocks, each verified"]
        if self.course.has_checksums and not work.is_write:
            cost = self.begun.lease_s / (work.num_bytes / GB)
            parts.append(f"checksums known from the lease (prep: {cost:.3f} s/GB, once)")
        else:
            parts.append("checksums computed while it is sent")
        return ", ".join([*parts, *([self.way.note] if self.way.note else [])])


def _entrants(pairs: KvxPairs, work: Work, made: contextlib.ExitStack) -> Iterator[_Entrant]:
    for way, pair in pairs.pairs.items():
        pair.fill(work, 0)
        # Of what is written nobody knows checksums before.
        for has_checksums in (False,) if work.is_write else (True, False):
            if way.variant and not has_checksums and not work.is_write:
                continue
            course = Course(way.backend, work, has_checksums)
            yield _Entrant(way, pair, course, made.enter_context(pair.begin(course)))


def _in_order(
    able: list[Baseline], entrants: list[_Entrant], work: Work
) -> dict[str, Callable[[], Sample]]:
    """Return who runs after whom: of two that share a connection one before all the others.

    The kernel sends slowly at first over a TCP connection that has been idle, so whoever ran right
    behind its twin would have it warm, which the baselines have not.
    """
    found: dict[str, Callable[[], Sample]] = {}
    for one in entrants:
        if one.is_unknown:
            found[one.name] = one.begun.once
    for baseline in able:
        found[baseline.name] = partial(baseline.run, work)
    for one in entrants:
        if not one.is_unknown:
            found[one.name] = one.begun.once
    return found


def _rows(limits: Limits, pairs: KvxPairs, work: Work, rounds: int) -> Iterator[Row]:
    """Yield the rows of one size and direction, baselines first."""
    able = limits.able(work)
    with contextlib.ExitStack() as made:
        entrants = list(_entrants(pairs, work, made))
        contest = hold(_in_order(able, entrants, work), work.num_bytes, rounds=rounds)
    for one in able:
        assert one.moves_all(work), f"{one.name}, {work}: what arrived is what was sent"
        key = f"transfer.baseline.{one.name}.{work.operation}.{size_name(work.block_bytes)}"
        limit = () if one.name == TOP else (TOP,)
        yield contest.row(key, one.name, *limit, note=f"{work.batch} blocks; {one.description}")
    for entrant in entrants:
        found, _, _ = entrant.pair.checked(entrant.course, 1)
        assert found is None, f"{entrant.name}, {work}: {found}"
        limits_there = limits_of(entrant.way.backend, work.block_bytes)
        yield contest.row(entrant.key, entrant.name, *limits_there, note=entrant.note)

"""What transfers cost besides moving bytes: to submit them, to wait for them, to have them idle."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from kvx_bench.row import Row, median, percentiles_us
from kvx_bench.transfer.baselines.work import Work
from kvx_bench.transfer.pair.pair import Begun, Course
from kvx_bench.transfer.sizes import size_name

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from kvx_bench.transfer.baselines.limits import Echo, Limits
    from kvx_bench.transfer.kvx_pairs import KvxPairs

_POST_BLOCKS = 10_000
_POST_BYTES = 4 << 10
_ROUND_TRIP_BYTES = 4 << 10
_ROUNDS = 5
_WARM_UP = 50
# The one-copy ways have no exchange of their own; the nearest thing between two processes of a
# host is a unix socket.
_ECHO_OF = {"shm": "unix", "tcp": "sockets-default", "nixl": "nixl-auto"}
# On one host UCX copies while it posts, so of that one this is the time of the transfer.
_POST_OF = {"shm": "nixl-auto", "tcp": "nixl-tcp", "nixl": "nixl-auto"}
Figures = tuple[float, float]


def post_work() -> Work:
    """Return what is submitted to see how long that takes."""
    return Work(is_write=False, block_bytes=_POST_BYTES, batch=_POST_BLOCKS)


def post_rows(pairs: KvxPairs, limits: Limits, count: int) -> Iterator[Row]:
    """Host time of submitting 10,000 blocks in any order, beside raw NIXL's."""
    theirs: dict[str, tuple[list[float], list[float]]] = {}
    for nixl in limits.nixl:
        theirs[nixl.name] = nixl.posts(_POST_BYTES, _POST_BLOCKS, count)
        for is_prepared, times in enumerate(theirs[nixl.name]):
            key = f"transfer.baseline.{nixl.name}.post.{_POST_BLOCKS}{_suffix(is_prepared)}"
            yield _latency_row(key, percentiles_us(times), note=_post_note(is_prepared))
    work = post_work()
    for way, pair in pairs.pairs.items():
        if way.variant:
            continue
        for is_prepared, times in enumerate(pair.posts(work, way.backend, count)):
            limit = _POST_OF[way.backend]
            raw = theirs.get(limit)
            yield _latency_row(
                f"transfer.post.{_POST_BLOCKS}.{way.backend}{_suffix(is_prepared)}",
                percentiles_us(times),
                limit=(limit, percentiles_us(raw[is_prepared])) if raw else None,
                note=_post_note(is_prepared),
            )


def idle_rows(pairs: KvxPairs, limits: Limits, seconds: float) -> Iterator[Row]:
    """CPU share of two connected agents that have nothing to do; all of them at the same time."""
    clocks: dict[str, Callable[[], float]] = {
        f"transfer.idle.{way.backend}": lambda pair=pair: sum(pair.cpu())  # type: ignore[misc]
        for way, pair in pairs.pairs.items()
        if not way.variant
    }
    clocks |= {f"transfer.baseline.{one.name}.idle": one.cpu_s for one in limits.nixl}
    before = {key: clock() for key, clock in clocks.items()}
    time.sleep(seconds)  # what is measured: nothing happens
    for key, clock in clocks.items():
        share = (clock() - before[key]) / seconds
        yield Row(key, cpu_share=share, note=f"{100 * share:.3f} % of a CPU, both processes")


def round_trip_rows(pairs: KvxPairs, limits: Limits, count: int) -> Iterator[Row]:
    """Time of one block, begun and waited for, beside what an exchange costs without kvx."""
    size = size_name(_ROUND_TRIP_BYTES)
    contestants = _kvx_round_trips(pairs, count // _ROUNDS)
    contestants |= {one.name: _echo_of(one, count // _ROUNDS) for one in limits.echoes}
    rounds = [{name: run() for name, run in contestants.items()} for _ in range(_ROUNDS)]
    figures = {
        name: (median(one[name][0] for one in rounds), median(one[name][1] for one in rounds))
        for name in contestants
    }
    for echo in limits.echoes:
        key = f"transfer.baseline.{echo.name}.roundtrip.{size}"
        yield _latency_row(key, figures[echo.name], note=echo.description)
    for name, found in figures.items():
        backend = name.partition(".")[0]
        if name not in _kvx_names(pairs):
            continue
        limit = _ECHO_OF[backend]
        yield _latency_row(
            f"transfer.roundtrip.{size}.{name}",
            found,
            limit=(limit, figures[limit]) if limit in figures else None,
            note="one prepared block, begun and waited for",
        )


def _kvx_names(pairs: KvxPairs) -> set[str]:
    return {
        f"{way.backend}.{verb}"
        for way in pairs.pairs
        if not way.variant
        for verb in ("read", "write")
    }


def _kvx_round_trips(pairs: KvxPairs, count: int) -> dict[str, Callable[[], Figures]]:
    found: dict[str, Callable[[], Figures]] = {}
    for way, pair in pairs.pairs.items():
        if way.variant:
            continue
        for is_write in (False, True):
            work = Work(is_write, _ROUND_TRIP_BYTES, 1)
            pair.fill(work, 0)
            begun = pair.begin(Course(way.backend, work, has_checksums=True))

            def run(begun: Begun = begun) -> Figures:
                return percentiles_us(begun.burst(_WARM_UP + count).wall_s[_WARM_UP:])

            found[f"{way.backend}.{work.operation}"] = run
    return found


def _echo_of(echo: Echo, count: int) -> Callable[[], Figures]:
    return lambda: echo.round_trips_us(_ROUND_TRIP_BYTES, count)


def _latency_row(
    key: str, figures: Figures, *, limit: tuple[str, Figures] | None = None, note: str = ""
) -> Row:
    """Return a row whose limit and ratio are those of the median."""
    return Row(
        key,
        limit=limit[1][0] if limit else None,
        ratio=limit[1][0] / figures[0] if limit else None,
        limit_name=limit[0] if limit else "",
        p50_us=figures[0],
        p99_us=figures[1],
        note=note,
    )


def _suffix(is_prepared: int) -> str:
    return ".prepared" if is_prepared else ""


def _post_note(is_prepared: int) -> str:
    what = "prepared once" if is_prepared else "described anew each time"
    return f"until the submission of 4 KiB blocks came back, {what}"

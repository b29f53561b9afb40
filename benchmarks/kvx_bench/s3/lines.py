"""kvx through lines to the server that are longer, and how soon the first block comes through."""

from __future__ import annotations

import contextlib
from functools import partial
from typing import TYPE_CHECKING, Any

from kvx_bench.row import Row, median, percentiles_us
from kvx_bench.s3.delay import DelayedLine
from kvx_bench.s3.entrant import STANDING, Entrant
from kvx_bench.s3.rig import KVX, Rig
from kvx_bench.transfer.contest import hold

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from kvx_bench.row import Sample

_DELAYS_MS = (0, 50)
_DIRECT = "direct"
_SINGLES = 20
# For each round: a first block is one sample, not an average over many.
_TURNS = 2


def line_rows(rig: Rig) -> Iterator[Row]:
    """Yield gets and puts through lines, each beside the same without the delay."""
    with _through_lines(rig, rig.num_blocks) as entrants:
        entrants[_DIRECT].store()
        for verb in ("get", "put"):
            runs: dict[str, Callable[[], Sample]] = {
                name: partial(getattr(entrant, verb)) for name, entrant in entrants.items()
            }
            contest = hold(runs, rig.num_bytes, rounds=rig.rounds)
            shorter = _DIRECT
            for delay_ms in _DELAYS_MS:
                name = _name(delay_ms)
                note = f"a round trip takes {delay_ms} ms longer"
                note += "" if delay_ms else ": what the line itself costs"
                yield contest.row(f"s3.{verb}.{rig.size}.{name}", name, shorter, _DIRECT, note=note)
                shorter = name


def first_block_rows(rig: Rig, num_blocks: int) -> Iterator[Row]:
    """Yield how long the first block of a long prompt takes, beside a single get of one block."""
    with _through_lines(rig, num_blocks) as entrants:
        entrants[_DIRECT].store()
        for name, entrant in entrants.items():
            delay_ms = dict(zip(map(_name, _DELAYS_MS), _DELAYS_MS, strict=True)).get(name)
            if delay_ms == 0:
                continue
            times, singles, steady_s = _in_turn(rig, entrant)
            firsts = [float(one["first_s"]) for one in times]
            p50_us, p99_us = percentiles_us(firsts)
            whole_s = median(float(one["whole_s"]) for one in times)
            yield Row(
                f"s3.first-block.{num_blocks}.{name}", p50_us=p50_us, p99_us=p99_us,
                note=f"{median(firsts) / median(singles):.2f} single gets of one block, which take "
                f"{median(singles) * 1e3:.1f} ms in turn with it and {steady_s * 1e3:.1f} ms one "
                f"right after another; all {num_blocks} x {rig.size}: {whole_s * 1e3:.0f} ms",
            )  # fmt: skip


def _in_turn(rig: Rig, entrant: Entrant) -> tuple[list[dict[str, Any]], list[float], float]:
    """Return times of first blocks, the seconds of single gets beside them, and in a row.

    A single get is another client's that does nothing else. After a prompt, with which the server
    and all caches have been busy, it takes longer than one right after another.
    """
    place = rig.place(url=entrant.place.url)
    times, singles = [], []
    with rig.open("obstore", place, num_blocks=1) as one:
        one.store()
        for _ in range(_TURNS * rig.rounds):
            times.append(entrant.ask("first", prompt=STANDING))
            singles += one.ask("singles", prompt=STANDING, count=1)["times"]
        steady_s = median(one.ask("singles", prompt=STANDING, count=_SINGLES)["times"])
    return times, singles, steady_s


@contextlib.contextmanager
def _through_lines(rig: Rig, num_blocks: int) -> Iterator[dict[str, Entrant]]:
    with contextlib.ExitStack() as made:
        urls = {_DIRECT: rig.bucket.service.url}
        for delay_ms in _DELAYS_MS:
            line = made.enter_context(DelayedLine(rig.bucket.service, delay_s=delay_ms / 1e3))
            urls[_name(delay_ms)] = line.service.url
        capacity = rig.place().capacity_bytes * num_blocks // rig.num_blocks
        yield {
            name: made.enter_context(
                rig.open(KVX, rig.place(url=url, capacity_bytes=capacity), num_blocks=num_blocks)
            )
            for name, url in urls.items()
        }


def _name(delay_ms: int) -> str:
    return f"line-{delay_ms}ms"

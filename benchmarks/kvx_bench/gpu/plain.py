"""The limits: one large contiguous copy each way, both ways at once, and within the device."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from kvx_bench.gpu.rig import DIRECTIONS, Runs, forcing, size_name
from kvx_bench.row import GB, Row, median, timed

if TYPE_CHECKING:
    from collections.abc import Iterator

    from kvx_bench.case import Options
    from kvx_bench.gpu.rig import GpuRig
    from kvx_bench.row import Sample


def plain_rows(rig: GpuRig, options: Options) -> Iterator[Row]:
    """Measure; the limit of these is what the link's wires carry."""
    num_bytes = 2 * rig.total_bytes
    name = size_name(num_bytes)
    link = rig.link_gb_per_s
    whole = Runs(num_bytes, np.zeros(1, np.int64))
    for direction in DIRECTIONS:
        rig.prepare(direction)
        samples = [rig.plain(direction, num_bytes) for _ in range(options.repeats + 1)][1:]
        rig.check(direction, whole)
        yield _row(f"gpu.plain.{direction}.{name}", num_bytes, samples, link)
    samples = [_both_ways(rig) for _ in range(options.repeats + 1)][1:]
    yield _row(
        f"gpu.plain.both.{size_name(rig.total_bytes)}", 2 * rig.total_bytes, samples,
        None if link is None else 2 * link, note="bytes of both ways together",
    )  # fmt: skip
    samples = [_within(rig) for _ in range(options.repeats + 1)][1:]
    yield _row(
        f"gpu.plain.d2d.{size_name(rig.total_bytes)}", rig.total_bytes, samples, None,
        note="each byte is read and written, and counted once",
    )  # fmt: skip


def _row(
    key: str, num_bytes: int, samples: list[Sample], limit: float | None, *, note: str = ""
) -> Row:
    gb_per_s = num_bytes / GB / median(sample.wall_s for sample in samples)
    return Row(
        key,
        gb_per_s=gb_per_s,
        limit=limit,
        ratio=None if limit is None else gb_per_s / limit,
        cpu_s_per_gb=median(sample.cpu_s for sample in samples) / (num_bytes / GB),
        note=note,
    )


def _both_ways(rig: GpuRig) -> Sample:
    """The lower half of the device's memory is written while the upper one is read."""
    size = rig.total_bytes
    rig.prepare("d2h")
    with rig.copies(sm="never", calibration=forcing("single")) as copies:

        def work() -> None:
            down = rig.submit(copies, "h2d", Runs(size, np.zeros(1, np.int64)))
            up = rig.submit(copies, "d2h", Runs(size, np.ones(1, np.int64)))
            rig.finish(copies, down)
            rig.finish(copies, up)

        sample = timed(work)
    rig.check("d2h", Runs(size, np.ones(1, np.int64)))
    rig.check("h2d", Runs(size, np.zeros(1, np.int64)))
    return sample


def _within(rig: GpuRig) -> Sample:
    """The upper half of the device's memory becomes the lower one."""
    size = rig.total_bytes
    rig.prepare("d2h")
    source, sizes = np.array([rig.device_address], np.uint64), np.array([size], np.uint64)
    target = source + np.uint64(size)
    with rig.copies(sm="never", calibration=forcing("single")) as copies:
        sample = timed(lambda: rig.finish(copies, copies.submit("d2d", target, source, sizes)))
    rig.check("h2d", Runs(size, np.ones(1, np.int64)))
    return sample

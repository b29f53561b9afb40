"""What is paid beside the bytes: pinning, the wait for a small copy, the CPU's part of a list."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import numpy as np

from kvx_bench.copying import prefaulted
from kvx_bench.gpu.fragments import batching
from kvx_bench.gpu.rig import Runs, forcing, paged, size_name
from kvx_bench.row import GB, Row, median, percentiles_us, timed
from kvx_ext import _core

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    import numpy.typing as npt

    from kvx_bench.case import Options
    from kvx_bench.gpu.rig import GpuRig
    from kvx_bench.row import Sample

_SMALL_BYTES = 4096
_NUM_RUNS = 4096
_GIB = 1 << 30
_PIN_PATIENCE_S = 120.0


def pinning_rows(rig: GpuRig, options: Options) -> Iterator[Row]:
    """Register memory whose pages are there; that they are is what costs most."""
    num_bytes = (256 << 20) if options.is_quick else 4 * _GIB
    began = time.perf_counter()
    array = prefaulted(num_bytes)
    populating_s = time.perf_counter() - began
    samples = [_pinned_once(rig, array) for _ in range(3)]
    gib = num_bytes / _GIB
    wall_s = median(sample.wall_s for sample in samples)
    limit = num_bytes / GB / populating_s
    yield Row(
        f"gpu.pin.{size_name(num_bytes)}",
        gb_per_s=num_bytes / GB / wall_s,
        limit=limit,
        ratio=populating_s / wall_s,
        cpu_s_per_gb=median(sample.cpu_s for sample in samples) / (num_bytes / GB),
        note=f"{wall_s / gib:.3f} s/GiB; limit: populating the pages before, on all CPUs, "
        f"{populating_s / gib:.3f} s/GiB",
    )


def _pinned_once(rig: GpuRig, array: npt.NDArray[np.uint8]) -> Sample:
    ranges: list[_core.PinnedRange] = []

    def pin() -> None:
        ranges.append(rig.device.pin(array.ctypes.data, array.nbytes))
        assert ranges[0].wait(_PIN_PATIENCE_S), "pinning ends"

    sample = timed(pin)
    assert ranges[0].pinned_bytes == array.nbytes, "all of it is pinned"
    ranges[0].close()
    return sample


def latency_row(rig: GpuRig, options: Options) -> Row:
    """Time one small copy from submit to the end of the wait, again and again."""
    count = 200 if options.is_quick else 2000
    runs = Runs(_SMALL_BYTES, np.zeros(1, np.int64))
    stream = rig.device.create_stream()

    def fill() -> None:
        rig.device.fill(rig.device_address, 0, _SMALL_BYTES, stream)
        rig.device.stream_synchronize(stream)

    rig.prepare("h2d")
    fills = _seconds(fill, count)
    with rig.copies(sm="never", calibration=forcing("single")) as copies:
        seconds = _seconds(lambda: rig.finish(copies, rig.submit(copies, "h2d", runs)), count)
    rig.device.destroy_stream(stream)
    rig.check("h2d", runs)
    p50_us, p99_us = percentiles_us(seconds)
    fill_us, _ = percentiles_us(fills)
    return Row(
        f"gpu.latency.h2d.{size_name(_SMALL_BYTES)}",
        per_s=1e6 / p50_us,
        limit=1e6 / fill_us,
        ratio=fill_us / p50_us,
        p50_us=p50_us,
        p99_us=p99_us,
        note=f"limit: fill as much and wait for the stream, p50 {fill_us:.1f} us",
    )


def submission_row(rig: GpuRig, options: Options) -> Row:
    """The CPU's time for a list, from taking it to the driver's call."""
    run_bytes = min(_SMALL_BYTES, rig.total_bytes // _NUM_RUNS)
    runs = paged(run_bytes, _NUM_RUNS * run_bytes)
    count = len(runs.places)
    samples_us, whole_us = [], []
    with batching(rig) as copies:
        for _ in range(5 * options.repeats):
            before = copies.stats()
            rig.finish(copies, rig.submit(copies, "h2d", runs))
            after = copies.stats()
            samples_us.append((after["prepare_ns"] - before["prepare_ns"]) / 1e3)
            whole_us.append((after["submit_ns"] - before["submit_ns"]) / 1e3)
    rig.check("h2d", runs)
    p50_us, p99_us = sorted(samples_us)[len(samples_us) // 2], max(samples_us)
    size = np.uint64(run_bytes)
    planning_us = _core.time_plan_copies(
        "h2d", (runs.places.astype(np.uint64) + np.uint64(1 << 32)) * size,
        np.arange(1, count + 1, dtype=np.uint64) * size, np.full(count, size),
        forcing("batch"), repeats=50,
    ) / 1e3  # fmt: skip
    return Row(
        f"gpu.submit.h2d.{count}x{size_name(run_bytes)}",
        per_s=count / p50_us * 1e6,
        limit=count / planning_us * 1e6,
        ratio=planning_us / p50_us,
        p50_us=p50_us,
        p99_us=p99_us,
        note=f"{p50_us * 1e3 / count:.1f} ns a run before the driver's call, p99 is the longest, "
        f"p50 {sorted(whole_us)[len(whole_us) // 2]:.0f} us with the call; limit: planning alone",
    )


def _seconds(work: Callable[[], object], count: int) -> list[float]:
    for _ in range(10):
        work()
    taken = []
    for _ in range(count):
        began = time.perf_counter()
        work()
        taken.append(time.perf_counter() - began)
    return taken

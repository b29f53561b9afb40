"""What planning a copy costs the CPU, a run of the list; no device is needed."""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from kvx_bench.row import Row
from kvx_ext import _core

if TYPE_CHECKING:
    from collections.abc import Iterator

    import numpy.typing as npt

    from kvx_bench.case import Options

_NUM_RUNS = 4096
_NUM_PLANES = 64
_HOST, _DEVICE = 1 << 40, 1 << 44
_STAGING_BYTES = 64 << 20
# A tier of 64 GiB, registered in pieces of 1 GiB.
_PINNED = np.array([[_HOST, 64 << 30, 1 << 30]], np.uint64)


@dataclass(frozen=True, slots=True)
class _List:
    """Runs of one size, onboarded: `targets` and `sources` in units of it."""

    variant: str
    targets: npt.NDArray[np.int64]
    sources: npt.NDArray[np.int64]
    note: str


class PlanCase:
    """4096 runs a list, planned again and again into the same plan, one thread."""

    name = "plan"
    description = "planning copies to a device"

    def why_not(self, _options: Options) -> str:
        """It runs everywhere."""
        return ""

    def run(self, options: Options) -> Iterator[Row]:
        """Each list with and without kernels to stage for, 8 and 64 KiB a run."""
        for run_bytes in (8 << 10, 64 << 10):
            for one in _lists():
                for has_kernels in (False, True):
                    yield _row(one, run_bytes, options.repeats, has_kernels=has_kernels)


def _lists() -> Iterator[_List]:
    rng = np.random.default_rng(1)
    ascending = np.arange(_NUM_RUNS)
    scattered = rng.permutation(4 * _NUM_RUNS)[:_NUM_RUNS]
    yield _List("mergeable", ascending, ascending, "all become one run")
    by_16 = ascending + ascending // 16 * 16
    yield _List("mergeable-16", by_16, by_16, "16 become one run")
    yield _List("unmergeable", scattered, rng.permutation(scattered), "no order, nothing touches")
    permuted = rng.permutation(ascending)
    yield _List("permuted", permuted, permuted, "all become one run once they are sorted")
    # 64 blocks of a layer-first cache; each fills one slot of the host, plane after plane.
    num_blocks = _NUM_RUNS // _NUM_PLANES
    blocks, planes = np.divmod(ascending, _NUM_PLANES)
    targets = planes * 4096 + rng.permutation(4096)[:num_blocks][blocks]
    sources = 2 * rng.permutation(num_blocks)[blocks] * _NUM_PLANES + planes
    yield _List("layer-first", targets, sources, "64 blocks of 64 planes, block by block")
    plane_major = np.argsort(planes, kind="stable")
    yield _List(
        "layer-first-planes", targets[plane_major], sources[plane_major],
        "the same plane by plane; sorted where that lets them be staged",
    )  # fmt: skip


def _row(one: _List, run_bytes: int, repeats: int, *, has_kernels: bool) -> Row:
    arguments = (
        "h2d",
        (_DEVICE + one.targets * run_bytes).astype(np.uint64),
        (_HOST + one.sources * run_bytes).astype(np.uint64),
        np.full(len(one.targets), run_bytes, np.uint64),
    )
    staging_bytes = _STAGING_BYTES if has_kernels else 0
    plan = _core.plan_copies(
        *arguments, has_kernels=has_kernels, staging_bytes=staging_bytes, pinned=_PINNED
    )
    ns = statistics.median(
        _core.time_plan_copies(
            *arguments,
            has_kernels=has_kernels,
            staging_bytes=staging_bytes,
            pinned=_PINNED,
            repeats=100,
        )
        for _ in range(repeats)
    )
    calls = np.asarray(plan["methods"])
    methods = {_core.copy_methods()[method] for method in calls.tolist()}
    runs_left = len(np.asarray(plan["bytes"]))
    return Row(
        f"plan.h2d.{run_bytes >> 10}KiB.{one.variant}{'.kernels' if has_kernels else ''}",
        per_s=1e9 * len(one.targets) / ns,
        p50_us=ns / 1e3,
        note=f"{ns / len(one.targets):.1f} ns a run; {one.note}; {runs_left} runs left, "
        f"{len(calls)} calls, {' and '.join(sorted(methods))}",
    )

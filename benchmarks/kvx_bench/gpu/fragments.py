"""Batches of fragments, by each method and as the planner would: the same bytes in every row."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

import numpy as np

from kvx_bench.gpu.rig import DIRECTIONS, METHODS, SIZES, forcing, paged, size_name
from kvx_bench.row import Row, paired, throughput_row
from kvx_ext import _core

if TYPE_CHECKING:
    from collections.abc import Iterator

    from kvx_bench.case import Options
    from kvx_bench.gpu.rig import GpuRig, Runs


def fragment_rows(rig: GpuRig, options: Options) -> Iterator[Row]:
    """Force each method first; what that measures is the calibration the planner chooses by."""
    rates, plain = np.zeros_like(forcing()), np.zeros(len(_core.copy_directions()))
    reasons = {method: rig.why_not(method) for method in METHODS}
    for direction in DIRECTIONS:
        bench = _Bench(rig, direction, options.repeats)
        at = _core.copy_directions().index(direction)
        for method, reason in reasons.items():
            if reason:
                yield Row(f"gpu.{direction}.{method}", note=f"not here: {reason}")
                continue
            for step, row in enumerate(bench.forced(method)):
                rates[at, METHODS.index(method), step] = row.gb_per_s
                yield row
        plain[at] = rig.plain_gb_per_s(direction, rig.total_bytes, options.repeats)
        for sm in ("auto", "never"):
            with rig.copies(sm=sm, calibration=rates, plain=plain) as copies:
                yield from bench.planned(copies, sm)


class _Bench:
    """One direction."""

    def __init__(self, rig: GpuRig, direction: str, repeats: int) -> None:
        self._rig = rig
        self._direction = direction
        self._repeats = repeats

    def forced(self, method: str) -> Iterator[Row]:
        """All sizes by one method; only staging may use SMs."""
        sm = "auto" if method == "staged" else "never"
        with self._rig.copies(sm=sm, calibration=forcing(method)) as copies:
            for size in SIZES:
                runs = paged(size, self._rig.total_bytes, is_even=method == "rows")
                row, used = self._measured(copies, f"{size_name(size)}.{method}", runs, sm)
                assert used == [method], f"{row.key} went by {used}"
                yield row

    def planned(self, copies: _core.Copies, sm: str) -> Iterator[Row]:
        """All sizes by whatever the planner takes."""
        for size in SIZES:
            runs = paged(size, self._rig.total_bytes)
            yield self._measured(copies, f"{size_name(size)}.planner-{sm}", runs, sm)[0]

    def _measured(
        self, copies: _core.Copies, name: str, runs: Runs, sm: str
    ) -> tuple[Row, list[str]]:
        """Return the row and the methods that were used."""
        rig, direction = self._rig, self._direction
        rig.prepare(direction)
        before = copies.stats()
        pairs = paired(
            lambda: rig.copy(copies, direction, runs),
            lambda: rig.plain(direction, runs.num_bytes),
            repeats=self._repeats,
        )
        after = copies.stats()
        # The limit has gone to the same memory meanwhile.
        rig.prepare(direction)
        rig.copy(copies, direction, runs)
        rig.check(direction, runs)
        launched = after["kernels_launched"] - before["kernels_launched"]
        assert sm != "never" or launched == 0, f"{launched} kernels launched with sm=never"
        used = [one for one in METHODS if after[f"runs_{one}"] > before[f"runs_{one}"]]
        lists = self._repeats + 1
        calls = sum(after[f"calls_{one}"] - before[f"calls_{one}"] for one in used) // lists
        note = (
            f"{len(runs.places)} runs by {' and '.join(used)}, {calls} driver calls, "
            f"{launched // lists} kernels"
        )
        return throughput_row(f"gpu.{direction}.{name}", runs.num_bytes, pairs, note=note), used


@contextlib.contextmanager
def batching(rig: GpuRig) -> Iterator[_core.Copies]:
    """Open copies that go to the copy engines in batches, or one by one with an old driver."""
    method = "single" if rig.why_not("batch") else "batch"
    with rig.copies(sm="never", calibration=forcing(method)) as copies:
        yield copies

"""Ways to keep the link busy with an offload that never ends, two halves of a list in turn."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Protocol

from kvx_ext import _core

if TYPE_CHECKING:
    from collections.abc import Iterator

    from kvx_bench.gpu.rig import GpuRig, Runs


class Mover(Protocol):
    """One way; `begin` and `finish` alternate for each of the halves 0 and 1."""

    def begin(self, half: int) -> None:
        """Start a half."""

    def finish(self, half: int) -> int:
        """Wait for it; returns its bytes."""

    def check(self) -> None:
        """Compare what has arrived."""


class _Halves:
    """The list in two, each with its own slots on the host."""

    def __init__(self, rig: GpuRig, runs: Runs) -> None:
        self._rig = rig
        self._halves = [runs.half(number) for number in (0, 1)]
        self._firsts = [0, len(self._halves[0].places)]

    def check(self) -> None:
        """Compare what has arrived."""
        for half, first in zip(self._halves, self._firsts, strict=True):
            self._rig.check("d2h", half, first=first)


class CopiesMover(_Halves):
    """By copies as the library makes them."""

    def __init__(self, rig: GpuRig, copies: _core.Copies, runs: Runs) -> None:
        super().__init__(rig, runs)
        self._copies = copies
        self._tickets = [0, 0]

    def begin(self, half: int) -> None:
        """Start a half."""
        self._tickets[half] = self._rig.submit(
            self._copies, "d2h", self._halves[half], first=self._firsts[half]
        )

    def finish(self, half: int) -> int:
        """Wait for it; returns its bytes."""
        self._rig.finish(self._copies, self._tickets[half])
        return self._halves[half].num_bytes


class KernelMover(_Halves):
    """By a kernel that writes pinned host memory itself, without a copy engine."""

    def __init__(self, rig: GpuRig, runs: Runs, ctas: int, streams: list[int]) -> None:
        super().__init__(rig, runs)
        self._kernels = _core.Kernels(rig.device)
        self._ctas = ctas
        self._streams = streams
        self._tables = [
            rig.offload_table(half, first)
            for half, first in zip(self._halves, self._firsts, strict=True)
        ]

    @classmethod
    @contextlib.contextmanager
    def open(cls, rig: GpuRig, runs: Runs, ctas: int) -> Iterator[Mover]:
        """Make one with streams of its own."""
        streams = [rig.device.create_stream() for _ in range(2)]
        try:
            yield cls(rig, runs, ctas, streams)
        finally:
            for stream in streams:
                rig.device.stream_synchronize(stream)
                rig.device.destroy_stream(stream)

    def begin(self, half: int) -> None:
        """Start a half."""
        runs = self._halves[half]
        self._kernels.copy_fragments(
            self._streams[half], self._tables[half].ctypes.data, len(runs.places), runs.run_bytes,
            self._ctas,
        )  # fmt: skip

    def finish(self, half: int) -> int:
        """Wait for it; returns its bytes."""
        self._rig.device.stream_synchronize(self._streams[half])
        return self._halves[half].num_bytes

"""What a plan of copies must hold, in Python: pieces, calls and predicted times."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from kvx_ext import _core

HOST, DEVICE = 1 << 40, 1 << 44
DIRECTIONS = ("h2d", "d2h", "d2d")
SIZES = [4096 << i for i in range(11)]

Run = tuple[int, int, int]  # target, source, bytes


@dataclass(frozen=True)
class Limits:
    has_batch: bool = True
    has_kernels: bool = False
    staging_bytes: int = 0
    batch_runs_max: int = 8192
    pinned: tuple[tuple[int, int, int], ...] = ()


@dataclass(frozen=True)
class Rates:
    """GB/s by direction, method and size; all zeros: none were measured."""

    gb_s: npt.NDArray[np.float64] = field(default_factory=lambda: np.zeros((3, 4, 11)))
    plain: npt.NDArray[np.float64] = field(default_factory=lambda: np.zeros(3))

    def ns(self, direction: str, method: str, num_bytes: int) -> float:
        return _core.predicted_copy_ns(direction, method, num_bytes, self.gb_s, self.plain)


@dataclass(frozen=True)
class Call:
    method: str
    runs: tuple[Run, ...]
    target_stride: int
    source_stride: int
    num_bytes: int


def rates(**methods: float | list[float]) -> Rates:
    """Return the same rates for every direction."""
    made = Rates()
    for name, gb_s in methods.items():
        if name == "plain":
            made.plain[:] = gb_s
        else:
            made.gb_s[:, _core.copy_methods().index(name)] = gb_s
    return made


def plan(direction: str, runs: list[Run], limits: Limits, known: Rates | None = None) -> list[Call]:
    columns = np.array(runs, np.uint64).reshape(-1, 3).T.copy()
    made = _core.plan_copies(
        direction, *columns, *(() if known is None else (known.gb_s, known.plain)),
        has_batch=limits.has_batch, has_kernels=limits.has_kernels,
        staging_bytes=limits.staging_bytes, batch_runs_max=limits.batch_runs_max,
        pinned=np.array(limits.pinned, np.uint64).reshape(-1, 3),
    )  # fmt: skip
    merged = list(zip(*(made[name].tolist() for name in ("targets", "sources", "bytes")),
                      strict=True))  # fmt: skip
    calls, done = [], 0
    for method, (first, count, target_stride, source_stride, num_bytes) in zip(
        made["methods"].tolist(), made["calls"].tolist(), strict=True
    ):
        assert first == done, "calls cover the runs in their order, each once"
        assert count > 0
        done = first + count
        name = _core.copy_methods()[method]
        calls.append(Call(name, tuple(merged[first:done]), target_stride, source_stride, num_bytes))
    assert done == len(merged)
    assert made["total_bytes"] == sum(num_bytes for *_, num_bytes in runs)
    return calls


def host_of(direction: str, run: Run) -> int | None:
    return {"h2d": run[1], "d2h": run[0], "d2d": None}[direction]


def piece_of(address: int, limits: Limits) -> tuple[int, int]:
    """Return (begin, end) of the piece an address lies in; of the gap if it lies outside."""
    begin, end = 0, 2**64 - 1
    for base, num_bytes, piece_bytes in limits.pinned:
        if base <= address < base + num_bytes:
            first = base + (address - base) // piece_bytes * piece_bytes
            return first, min(first + piece_bytes, base + num_bytes)
        if base + num_bytes <= address:
            begin = base + num_bytes
        elif address < base:
            end = min(end, base)
    return begin, end


def check_call(direction: str, call: Call, limits: Limits) -> None:
    """What the executor relies on."""
    assert call.num_bytes == sum(num_bytes for *_, num_bytes in call.runs)
    hosts = [host_of(direction, run) for run in call.runs]
    pieces = set()
    for host, run in zip(hosts, call.runs, strict=True):
        assert run[2] > 0
        if host is not None:
            begin, end = piece_of(host, limits)
            assert begin <= host < host + run[2] <= end, "a run crosses a piece"
            pieces.add(begin)
    if call.method == "rows":
        first = call.runs[0]
        assert len(call.runs) > 1
        assert len(pieces) <= 1
        for i, run in enumerate(call.runs):
            assert run[0] == first[0] + i * call.target_stride
            assert run[1] == first[1] + i * call.source_stride
            assert run[2] == first[2] <= min(call.target_stride, call.source_stride)
    elif call.method == "staged":
        assert limits.has_kernels
        assert len(pieces) == 1
        assert call.num_bytes <= limits.staging_bytes // 2
        for (host, run), following in itertools.pairwise(zip(hosts, call.runs, strict=True)):
            assert host is not None
            assert host + run[2] == following[0]
    elif call.method == "batch":
        assert limits.has_batch
        assert 1 < len(call.runs) <= limits.batch_runs_max


def predicted(direction: str, calls: list[Call], known: Rates) -> float:
    """Return ns of a whole plan; a batch of one is a plain copy and costs no more."""
    extra = {"rows": _core.ROWS_CALL_NS, "staged": _core.STAGED_CALL_NS}
    total = 0.0
    for call in calls:
        total += extra.get(call.method, 0.0)
        for *_, num_bytes in call.runs:
            ns = known.ns(direction, call.method, num_bytes)
            if call.method == "single" and len(call.runs) == 1:
                ns = min(ns, known.ns(direction, "batch", num_bytes))
            total += ns
    return total

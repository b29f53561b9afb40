"""One copy between two processes of one host: what no way over a socket can beat."""

from __future__ import annotations

import ctypes
import os
from typing import TYPE_CHECKING

from kvx_bench.transfer.cpu_clock import timed_with
from kvx_ext import _core

if TYPE_CHECKING:
    from collections.abc import Callable

    import numpy as np
    import numpy.typing as npt

    from kvx_bench.row import Sample
    from kvx_bench.transfer.baselines.bench_memory import TwoMemories
    from kvx_bench.transfer.baselines.work import Work

    Array = npt.NDArray[np.uint8]

_VECTORS_MAX = 1024  # IOV_MAX


def _memcpy(target: Array, source: Array, work: Work) -> Callable[[], object]:
    to, size = target.ctypes.data, work.block_bytes
    since = source.ctypes.data
    places = range(0, work.num_bytes, size)
    return lambda: [ctypes.memmove(to + at, since + at, size) for at in places]


def _streaming(target: Array, source: Array, _work: Work) -> Callable[[], object]:
    # In one call: of small blocks one would measure how long a call takes, and this is the limit.
    return lambda: _core.copy_only(target, source)


def _python(target: Array, source: Array, work: Work) -> Callable[[], object]:
    to, since = target.data, source.data
    spans = [slice(at, at + work.block_bytes) for at in range(0, work.num_bytes, work.block_bytes)]

    def copy() -> None:
        for span in spans:
            to[span] = since[span]

    return copy


class MappedCopy:
    """A memfd of the second process, mapped here and copied block by block on one thread."""

    def __init__(
        self,
        memories: TwoMemories,
        name: str,
        description: str,
        copying: Callable[[Array, Array, Work], Callable[[], object]],
    ) -> None:
        self.name = name
        self.description = description
        self._memories = memories
        self._copying = copying

    def why_not(self, _work: Work) -> str:
        """It runs everywhere."""
        return ""

    def run(self, work: Work) -> Sample:
        """Copy; the second process does nothing."""
        copy = self._copying(*self._memories.sides(work), work)
        return timed_with(copy, [self._memories.child.pid])

    def moves_all(self, work: Work) -> bool:
        """Copy once more and look."""
        return self._memories.arrives(work, lambda: self.run(work))


def mapped_copies(memories: TwoMemories) -> list[MappedCopy]:
    """Return every way to copy out of a mapping."""
    return [
        MappedCopy(memories, "memfd-memcpy", "a mapped memfd, memcpy of each block", _memcpy),
        MappedCopy(
            memories,
            "memfd-streaming",
            "a mapped memfd, all blocks in one call with streaming stores",
            _streaming,
        ),
        MappedCopy(memories, "memfd-python", "a mapped memfd, slices in Python", _python),
    ]


class _Vector(ctypes.Structure):
    _fields_ = (("base", ctypes.c_void_p), ("size", ctypes.c_size_t))


Vectors = ctypes.Array[_Vector]


class VmCopy:
    """process_vm_readv and process_vm_writev: one copy of memory that nobody shared."""

    name = "process-vm"
    description = "process_vm_readv or process_vm_writev, as many blocks a call as it takes"

    def __init__(self, memories: TwoMemories) -> None:
        self._memories = memories
        libc = ctypes.CDLL(None, use_errno=True)
        self._calls = {}
        for is_write, call in ((False, libc.process_vm_readv), (True, libc.process_vm_writev)):
            call.restype = ctypes.c_ssize_t
            call.argtypes = (
                ctypes.c_int, ctypes.POINTER(_Vector), ctypes.c_ulong,
                ctypes.POINTER(_Vector), ctypes.c_ulong, ctypes.c_ulong,
            )  # fmt: skip
            self._calls[is_write] = call

    def why_not(self, work: Work) -> str:
        """The kernel may forbid it, as it does between processes that are not parent and child."""
        try:
            self._copy(*self._vectors(work, 0, 1), work)
        except OSError as error:
            return f"{error.strerror}; see /proc/sys/kernel/yama/ptrace_scope"
        return ""

    def run(self, work: Work) -> Sample:
        """Copy; the second process does nothing."""
        calls = [
            self._vectors(work, first, min(_VECTORS_MAX, work.batch - first))
            for first in range(0, work.batch, _VECTORS_MAX)
        ]

        def copy() -> None:
            for ours, theirs in calls:
                self._copy(ours, theirs, work)

        return timed_with(copy, [self._memories.child.pid])

    def moves_all(self, work: Work) -> bool:
        """Copy once more and look."""
        return self._memories.arrives_apart(work, lambda: self.run(work))

    def _copy(self, ours: Vectors, theirs: Vectors, work: Work) -> None:
        count = len(ours)
        call = self._calls[work.is_write]
        # A call stops early at the most that one may move (2 GiB), which no call here reaches.
        moved = call(self._memories.child.pid, ours, count, theirs, count, 0)
        if moved < 0:
            error = ctypes.get_errno()
            raise OSError(error, os.strerror(error))
        assert moved == count * work.block_bytes, f"{moved} of {count * work.block_bytes} bytes"

    def _vectors(self, work: Work, first: int, count: int) -> tuple[Vectors, Vectors]:
        size = work.block_bytes
        places = [i * size for i in range(first, first + count)]
        kind = _Vector * count
        ours, theirs = self._memories.ours.ctypes.data, self._memories.their_address
        return (
            kind(*(_Vector(ours + place, size) for place in places)),
            kind(*(_Vector(theirs + place, size) for place in places)),
        )

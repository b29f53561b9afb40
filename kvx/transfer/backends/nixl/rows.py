"""From blocks to what NIXL takes: pairs of contiguous runs, in batches of whole blocks. Pure.

A block is rows at a stride on either side, and the two sides may be cut differently: eight rows of
64 KiB here are one of 512 KiB there. NIXL takes pairs of runs of one length, so each block is cut
wherever either side begins a new row.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from kvx.errors import UsageError

if TYPE_CHECKING:
    import numpy.typing as npt

    Int64s = npt.NDArray[np.int64]

_OFFSET, _STRIDE, _COUNT, _BYTES = range(4)
_SHARE_OF_LAST = 8


@dataclass(frozen=True, slots=True)
class Batch:
    """Whole blocks that one request moves.

    Attributes:
        first: Number of the first block.
        end: Behind the last one.
        first_run: Number of the first run.
        end_run: Behind the last one.
    """

    first: int
    end: int
    first_run: int
    end_run: int


@dataclass(frozen=True, slots=True, eq=False)
class Runs:
    """Contiguous runs of both sides, block after block.

    Attributes:
        local: (m,) int64 offsets.
        remote: (m,) int64 offsets of the same bytes on the other side.
        sizes: (m,) int64 bytes.
        block_ends: (n,) int64, the number of runs up to the end of each block.
    """

    local: Int64s
    remote: Int64s
    sizes: Int64s
    block_ends: Int64s


def check(blocks: Int64s, region_bytes: int, what: str) -> None:
    """Refuse blocks that do not lie within their region.

    Raises:
        UsageError: Names the first such block.
    """
    is_shape = blocks.ndim == 2 and blocks.shape[1] == 4  # noqa: PLR2004 - see _BYTES
    if not is_shape or not len(blocks):
        raise UsageError(f"the {what} blocks have the shape {blocks.shape}: (n, 4) is needed")
    columns = blocks.astype(object).T if (np.abs(blocks) >= 1 << 31).any() else blocks.T
    offset, stride, count, size = columns
    ends = offset + (count - 1) * stride + size
    is_wrong = (offset < 0) | (count < 1) | (size < 1) | (ends > region_bytes)
    is_wrong |= (count > 1) & (stride < size)
    if is_wrong.any():
        number = int(np.argmax(is_wrong))
        raise UsageError(
            f"{what} block {number}, {blocks[number].tolist()}, does not lie within the "
            f"{region_bytes} bytes of its region"
        )


def totals(blocks: Int64s) -> Int64s:
    """Return the bytes of each block."""
    sizes: Int64s = blocks[:, _COUNT] * blocks[:, _BYTES]
    return sizes


def cut(local: Int64s, remote: Int64s) -> Runs:
    """Cut blocks that were checked into runs that are contiguous on both sides.

    Raises:
        UsageError: Names the first block whose sides differ in bytes.
    """
    sizes = totals(local)
    if len(local) != len(remote) or (sizes != totals(remote)).any():
        unlike = np.flatnonzero(sizes != totals(remote)) if len(local) == len(remote) else [0]
        raise UsageError(f"block {int(unlike[0])} has other bytes on the other side")
    local, remote = _joined(local), _joined(remote)
    shapes = np.concatenate([local[:, 1:], remote[:, 1:]], axis=1)
    kinds, kind_of = np.unique(shapes, axis=0, return_inverse=True)
    kind_of = kind_of.reshape(-1)
    starts = [_starts(kind) for kind in kinds]
    lengths = [
        np.diff(np.append(start, kind[1] * kind[2]))
        for start, kind in zip(starts, kinds, strict=True)
    ]
    runs_of = np.array([len(start) for start in starts])[kind_of]
    block_ends = np.cumsum(runs_of)
    count = int(block_ends[-1])
    runs = Runs(
        np.empty(count, np.int64), np.empty(count, np.int64), np.empty(count, np.int64), block_ends
    )
    for number, (kind, start, length) in enumerate(zip(kinds, starts, lengths, strict=True)):
        members = np.flatnonzero(kind_of == number)
        at = (block_ends[members] - len(start))[:, None] + np.arange(len(start))
        runs.local[at] = local[members, :1] + _places(start, *kind[[0, 2]])
        runs.remote[at] = remote[members, :1] + _places(start, *kind[[3, 5]])
        runs.sizes[at] = length
    return runs


def batches(runs: Runs, batch_bytes: int) -> list[Batch]:
    """Group blocks into batches of at most `batch_bytes`, or one block.

    Towards the end they become smaller, down to an eighth: what is verified behind the last byte
    is not hidden behind anything.
    """
    ends = np.cumsum(runs.sizes)[runs.block_ends - 1]
    total, smallest = int(ends[-1]), max(1, batch_bytes // _SHARE_OF_LAST)
    found: list[Batch] = []
    first = before = first_run = 0
    while first < len(ends):
        room = min(batch_bytes, max((total - before) // 2, smallest))
        end = max(first + 1, int(np.searchsorted(ends, before + room, side="right")))
        end_run = int(runs.block_ends[end - 1])
        found.append(Batch(first, end, first_run, end_run))
        first, before, first_run = end, int(ends[end - 1]), end_run
    return found


def _joined(blocks: Int64s) -> Int64s:
    """Return the blocks with rows that touch each other made one."""
    is_whole = (blocks[:, _COUNT] == 1) | (blocks[:, _STRIDE] == blocks[:, _BYTES])
    joined = blocks.copy()
    joined[is_whole, _BYTES] = totals(blocks)[is_whole]
    joined[is_whole, _COUNT] = 1
    joined[is_whole, _STRIDE] = 0
    return joined


def _starts(kind: Int64s) -> Int64s:
    """Return where the runs of such a block begin in its canonical bytes."""
    total = int(kind[1] * kind[2])
    return np.union1d(np.arange(0, total, kind[2]), np.arange(0, total, kind[5]))


def _places(starts: Int64s, stride: int, row_bytes: int) -> Int64s:
    """Return where canonical positions lie, from the block's offset."""
    return starts // row_bytes * stride + starts % row_bytes

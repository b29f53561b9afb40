"""Which bytes of a registration: (n, 4) int64 rows of offset, stride, count, bytes. Pure.

A row is one block: `count` rows of `bytes` each, the first at `offset`, the next `stride` further.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from kvx.errors import UsageError
from kvx.transfer.core import DESCRIPTORS_MAX

if TYPE_CHECKING:
    import numpy.typing as npt

    Rows = npt.NDArray[np.int64]

SIZE_MAX = 1 << 48
OFFSET, STRIDE, COUNT, BYTES = range(4)


def blocks(ids: object, block_bytes: int) -> Rows:
    """Return the rows of equal blocks that lie back to back, by number."""
    numbers = as_int64(ids, "ids")
    if not 0 < block_bytes <= SIZE_MAX:
        raise UsageError(f"block_bytes = {block_bytes}; blocks have 1 byte or more")
    if len(numbers):
        low, high = int(numbers.min()), int(numbers.max())
        if low < 0 or high > SIZE_MAX // block_bytes:
            raise UsageError(
                f"block ids run from {low} to {high}; none may be negative or beyond any memory"
            )
    return contiguous(numbers * block_bytes, np.full(len(numbers), block_bytes, np.int64))


def contiguous(offsets: object, sizes: object) -> Rows:
    """Return the rows of runs without gaps."""
    starts, lengths = as_int64(offsets, "offsets"), as_int64(sizes, "bytes")
    if len(starts) != len(lengths):
        raise UsageError(f"{len(starts)} offsets but {len(lengths)} sizes")
    rows = np.empty((len(starts), 4), np.int64)
    rows[:, OFFSET], rows[:, STRIDE] = starts, lengths
    rows[:, COUNT], rows[:, BYTES] = 1, lengths
    return rows


def strided(offsets: object, stride: int, count: int, row_bytes: int) -> Rows:
    """Return rows of equal shape: at each offset `count` rows of `row_bytes`, `stride` apart."""
    starts = as_int64(offsets, "base")
    rows = np.empty((len(starts), 4), np.int64)
    rows[:, OFFSET], rows[:, STRIDE] = starts, as_size(stride, "stride")
    rows[:, COUNT], rows[:, BYTES] = as_size(count, "count"), as_size(row_bytes, "bytes")
    return rows


def as_rows(rows: object) -> Rows:
    """Return (n, 4) int64, C-contiguous, of what a caller passed."""
    array = np.ascontiguousarray(rows)
    if array.ndim != 2 or array.shape[1] != 4 or array.dtype.kind not in "iu":  # noqa: PLR2004 - four columns
        raise UsageError(
            f"descriptors are (n, 4) integers of offset, stride, count, bytes; this is "
            f"{array.shape} {array.dtype}"
        )
    if array.dtype.kind == "u" and array.size and int(array.max()) > SIZE_MAX:
        raise UsageError("a descriptor lies beyond any memory")
    return array.astype(np.int64, copy=False)


def as_int64(values: object, what: str) -> npt.NDArray[np.int64]:
    """Return (n,) int64 of whole numbers, or of one."""
    array = np.atleast_1d(np.asarray(values))
    if array.ndim != 1 or (array.dtype.kind not in "iu" and array.size):
        raise UsageError(
            f"{what} are whole numbers in one dimension, not {array.shape} {array.dtype}"
        )
    if array.dtype.kind == "u" and array.size and int(array.max()) > SIZE_MAX:
        raise UsageError(f"{what}: {int(array.max())} lies beyond any memory")
    return array.astype(np.int64)


def as_size(value: object, what: str) -> int:
    """Return a whole number that a size may have."""
    if isinstance(value, bool) or not isinstance(value, int | np.integer):
        raise UsageError(f"{what} = {value!r}; a whole number is needed")
    if not 0 <= int(value) <= SIZE_MAX:
        raise UsageError(f"{what} = {value}; from 0 to {SIZE_MAX} is possible")
    return int(value)


def objection(rows: Rows, region_bytes: int) -> str:
    """Return what is wrong with rows of a region, naming the first; empty when nothing is.

    Computes nothing that could overflow, for any values: a peer may have made them up.
    """
    if len(rows) > DESCRIPTORS_MAX:
        return f"{len(rows)} descriptors; at most {DESCRIPTORS_MAX} are possible in one list"
    offset, stride, count, size = rows.T
    room = np.int64(region_bytes) - size
    is_wrong = (offset < 0) | (count < 1) | (size < 1) | (offset > region_bytes) | (room < 0)
    is_wrong |= offset > room
    is_many = ~is_wrong & (count > 1)
    safe_stride = np.where(is_many & (stride > 0), stride, 1)
    is_wrong |= is_many & ((stride < size) | (count - 1 > (room - offset) // safe_stride))
    if not is_wrong.any():
        return ""
    first = int(np.flatnonzero(is_wrong)[0])
    values = ", ".join(
        f"{name} {int(value)}"
        for name, value in zip(("offset", "stride", "count", "bytes"), rows[first], strict=True)
    )
    return (
        f"descriptor {first} ({values}) does not fit {region_bytes} bytes: rows need 1 byte or "
        "more, strides no shorter than rows, and an end within the memory"
    )


def check(rows: Rows, region_bytes: int) -> Rows:
    """Return the rows; UsageError naming the first that does not fit its region."""
    wrong = objection(rows, region_bytes)
    if wrong:
        raise UsageError(wrong)
    return rows


def totals(rows: Rows) -> npt.NDArray[np.int64]:
    """Return the bytes of every block. REQUIRES: the rows were checked."""
    return rows[:, COUNT] * rows[:, BYTES]

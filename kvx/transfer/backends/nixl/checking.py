"""Checksums of what NIXL has moved: computed on both sides, compared by the owner of the memory."""

from __future__ import annotations

import ctypes
from typing import TYPE_CHECKING

import numpy as np

from kvx.buffers import MemoryKind
from kvx.errors import UsageError
from kvx.transfer.backends.fields import numbers_of
from kvx.transfer.backends.nixl import rows
from kvx.transfer.backends.nixl.messages import CHECK_BLOCKS_MAX, Check
from kvx_ext import _core

if TYPE_CHECKING:
    from collections.abc import Iterator

    import numpy.typing as npt

    from kvx.transfer.backend import LinkRequest, Memory
    from kvx.transfer.backends.nixl.rows import Int64s

    Uint64s = npt.NDArray[np.uint64]

_KEY_BYTES = 16


def checksums_of(memory: Memory, blocks: Int64s, keys: npt.NDArray[np.uint8] | None) -> Uint64s:
    """Compute checksums of blocks in host memory; other threads run meanwhile."""
    assert memory.kind is MemoryKind.HOST, "only host memory is verified"
    bytes_there = (ctypes.c_uint8 * memory.size_bytes).from_address(memory.address)
    sums: Uint64s = _core.row_checksums(
        np.frombuffer(memoryview(bytes_there), np.uint8), blocks, keys
    )
    return sums


def checks_of(request: LinkRequest, job: int, first: int, sums: Uint64s) -> Iterator[Check]:
    """Yield what the owner is told of the blocks from `first` on."""
    plan = request.plan
    for start in range(0, len(sums), CHECK_BLOCKS_MAX):
        part = slice(first + start, first + min(start + CHECK_BLOCKS_MAX, len(sums)))
        is_range = plan.indices is None
        yield Check(
            job=job,
            lease=numbers_of(request.lease),
            is_write=request.is_write,
            first=part.start,
            indices=b"" if plan.indices is None else plan.indices[part].astype("<u4").tobytes(),
            rows=plan.remote[part].astype("<i8").tobytes() if is_range else b"",
            keys=b"" if plan.keys is None else plan.keys[part].tobytes(),
            checksums=sums[start : start + CHECK_BLOCKS_MAX].astype("<u8").tobytes(),
        )


def disagreeing(check: Check, leased: Int64s, memory: Memory) -> list[int]:
    """Return which blocks of the transfer have another checksum in the owner's memory.

    Args:
        check: What a peer says.
        leased: (n, 4) int64 blocks of the lease it names.
        memory: The leased region.

    Raises:
        UsageError: The peer names blocks that are not leased, or nothing that makes sense.
    """
    told = _column(check.checksums, "<u8", 1).reshape(-1)
    blocks = _named(check, leased)
    keys = np.frombuffer(check.keys, np.uint8) if check.keys else None
    if len(blocks) != len(told) or (keys is not None and len(keys) != len(told) * _KEY_BYTES):
        raise UsageError(f"a check of {len(blocks)} blocks has {len(told)} checksums")
    rows.check(blocks, memory.size_bytes, "checked")
    if keys is not None:
        keys = keys.reshape(-1, _KEY_BYTES).copy()
    found = checksums_of(memory, blocks, keys)
    return [check.first + int(number) for number in np.flatnonzero(found != told)]


def _named(check: Check, leased: Int64s) -> Int64s:
    """Return the blocks that a peer names, all within its lease."""
    if check.indices:
        numbers = _column(check.indices, "<u4", 1).reshape(-1)
        if (numbers >= len(leased)).any():
            raise UsageError(f"block {int(numbers.max())} of a lease of {len(leased)} blocks")
        return leased[numbers]
    blocks = _column(check.rows, "<i8", 4).astype(np.int64)
    is_range = len(leased) == 1 and int(leased[0, 2]) == 1
    begin, size = int(leased[0, 0]), int(leased[0, 3])
    if not is_range or not len(blocks) or int(blocks[:, 0].min()) < begin:
        raise UsageError("descriptors outside a lease, or of one that is not one run of bytes")
    rows.check(blocks, begin + size, "checked")
    return blocks


def _column(data: bytes, dtype: str, width: int) -> npt.NDArray[np.int64]:
    item_bytes = np.dtype(dtype).itemsize * width
    if len(data) % item_bytes:
        raise UsageError(f"{len(data)} bytes where each entry has {item_bytes}")
    return np.frombuffer(data, dtype).reshape(-1, width)

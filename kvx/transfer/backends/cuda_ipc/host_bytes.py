"""Registered host memory as bytes, and what is done to those that must not be taken for KV."""

from __future__ import annotations

import ctypes
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import numpy.typing as npt

    from kvx.transfer.backend import Memory

# NaN in every KV dtype: who ignores the outcome cannot mistake it for KV.
_POISON = 0xFF


def bytes_of(memory: Memory) -> npt.NDArray[np.uint8]:
    """Return registered host memory as (size_bytes,) uint8; does not keep it alive."""
    return np.ctypeslib.as_array((ctypes.c_uint8 * memory.size_bytes).from_address(memory.address))


def poison(memory: npt.NDArray[np.uint8], rows: npt.NDArray[np.int64]) -> None:
    """Overwrite blocks, (n, 4) int64 of offset, stride, count, bytes."""
    for offset, stride, count, size in rows.tolist():
        for row in range(count):
            start = offset + row * stride
            memory[start : start + size] = _POISON

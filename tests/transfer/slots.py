"""Memory and small words for the tests of the native transfer engine."""

from collections.abc import Callable

import numpy as np

from kvx_ext import _core

OK, STORAGE, SHORT, CORRUPT, TIMEOUT, CANCELLED, SKIPPED = 0, 4, 5, 6, 8, 9, 10  # of kvx::Code
LONG_S = 20.0  # a deadline that only a bug reaches


class Slots:
    """Page-aligned host slots with the addresses that the engine wants."""

    def __init__(self, count: int, slot_bytes: int) -> None:
        """Map the slots, filled with 0xA5."""
        self.region = _core.HostRegion(count * slot_bytes)
        self.data = self.region.array()[: count * slot_bytes].reshape(count, slot_bytes)
        self.data[:] = 0xA5
        self.addresses = self.region.address + np.arange(count, dtype=np.int64) * slot_bytes


def planes_of(blocks: np.ndarray) -> np.ndarray:
    """One plane: the rows of a contiguous (n, bytes) uint8 array."""
    return np.array([[blocks.ctypes.data, blocks.strides[0], blocks.shape[1]]], dtype=np.int64)


def keys_of(count: int) -> np.ndarray:
    """`count` different keys."""
    keys = np.zeros((count, 16), dtype=np.uint8)
    keys[:, :8] = np.arange(count, dtype=np.uint64).reshape(-1, 1).view(np.uint8)
    return keys


def some_bytes(count: int, block_bytes: int, seed: int = 0) -> np.ndarray:
    """Random (count, block_bytes) uint8 blocks."""
    return np.random.default_rng(seed).integers(0, 256, (count, block_bytes), dtype=np.uint8)


EngineMaker = Callable[..., _core.Engine]


def expect(job: _core.Job, state: str, *codes: int) -> None:
    """Wait for a job and compare how it ended."""
    assert job.wait(LONG_S)
    assert job.state() == state, (job.state(), job.codes(), job.errnos())
    if codes:
        assert set(job.codes().tolist()) == set(codes)

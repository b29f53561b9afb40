"""Memory regions: aligned, writable, prefaulted when asked, alive as long as an array of theirs."""

from __future__ import annotations

import gc
import mmap
import os
import threading

import numpy as np
import pytest

from kvx.errors import KvxError
from kvx.transfer.memory import MemoryRegion

HUGE = 2 << 20


@pytest.mark.parametrize("size_bytes", [1, 4096, 4097, HUGE - 1, HUGE, 3 * HUGE + 5])
def test_size_and_alignment(size_bytes: int) -> None:
    region = MemoryRegion(size_bytes)
    assert region.size_bytes == -(-size_bytes // 4096) * 4096
    assert region.address % 4096 == 0
    if region.size_bytes >= HUGE:
        assert region.address % HUGE == 0
    assert region.fd == -1


def test_the_array_is_the_memory_and_starts_as_zeros() -> None:
    region = MemoryRegion(10_000)
    array = region.array()
    assert (array.dtype, array.shape) == (np.dtype(np.uint8), (12_288,))
    assert array.ctypes.data == region.address
    assert array.flags.writeable
    assert not array.any()
    array[:] = 7
    assert (region.array() == 7).all()


def test_an_array_outlives_its_region() -> None:
    region = MemoryRegion(1 << 20)
    array = region.array()
    array[:] = 3
    half = array[1 << 19 :]
    del region, array
    gc.collect()
    other = MemoryRegion(1 << 20).array()
    other[:] = 9
    assert (half == 3).all()


def test_prefault_populates_every_page() -> None:
    region = MemoryRegion(8 << 20)
    assert region.prefaulted_bytes == 0
    region.array()[5] = 42
    assert region.prefault(threads=2)
    assert region.prefaulted_bytes == region.size_bytes
    assert region.array()[5] == 42
    assert region.prefault()


def test_prefault_in_background_can_be_stopped() -> None:
    before = threading.active_count()
    region = MemoryRegion(256 << 20)
    region.prefault_in_background(threads=1)
    region.stop_prefault()
    assert threading.active_count() == before
    assert 0 <= region.prefaulted_bytes <= region.size_bytes
    region.stop_prefault()


def test_a_prefault_that_was_stopped_says_so() -> None:
    region = MemoryRegion(256 << 20)
    region.stop_prefault()
    assert not region.prefault()
    assert region.prefaulted_bytes < region.size_bytes


def test_a_shared_region_can_be_mapped_elsewhere() -> None:
    region = MemoryRegion(8192, is_shared=True)
    region.array()[:4] = [1, 2, 3, 4]
    assert os.fstat(region.fd).st_size == region.size_bytes
    with mmap.mmap(region.fd, region.size_bytes) as mapped:
        assert mapped[:4] == bytes([1, 2, 3, 4])
        mapped[4096] = 99
    assert region.array()[4096] == 99


@pytest.mark.parametrize("size_bytes", [0, -1, 1 << 62])
def test_impossible_sizes(size_bytes: int) -> None:
    with pytest.raises(KvxError, match=str(size_bytes)):
        MemoryRegion(size_bytes)


def test_a_node_that_is_not_there() -> None:
    """The kernel decides in the end; a wrong number must not crash."""
    try:
        region = MemoryRegion(4096, numa_node=63)
    except KvxError as error:
        assert "63" in str(error)  # noqa: PT017 - either is right
    else:
        assert not region.array().any()

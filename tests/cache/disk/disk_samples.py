"""What the tests of the on-disk format share: blocks to store, and an engine that just writes."""

import ctypes
import os
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from kvx.cache.disk import BlockRecords, DiskStore, RecordWrites

SLOT_BYTES = 4096
NOW_S = 1_700_000_000


def make_records(
    num_blocks: int, *, seed: int = 0, keys: NDArray[np.uint8] | None = None
) -> BlockRecords:
    """Return records of random blocks, none of which expires."""
    rng = np.random.default_rng(seed)
    if keys is None:
        keys = rng.integers(0, 256, (num_blocks, 16), dtype=np.uint8)
    return BlockRecords(
        keys=keys,
        payload_bytes=rng.integers(1, SLOT_BYTES + 1, num_blocks, dtype=np.uint32),
        checksums=rng.integers(0, 1 << 64, num_blocks, dtype=np.uint64),
        generations=rng.integers(0, 1 << 32, num_blocks, dtype=np.uint32),
        namespaces=rng.integers(0, 256, (num_blocks, 16), dtype=np.uint8),
        tenants=rng.integers(0, 1 << 63, num_blocks, dtype=np.uint64),
        heat=rng.integers(0, 256, num_blocks, dtype=np.uint8),
        stored_at_s=rng.integers(1, NOW_S, num_blocks, dtype=np.uint64),
        last_used_s=rng.integers(1, NOW_S, num_blocks, dtype=np.uint64),
        expiry_s=np.zeros(num_blocks, dtype=np.uint64),
    )


def open_store(
    path: Path,
    *,
    capacity_bytes: int = 4 << 20,
    extent_bytes: int | None = 256 << 10,
    recreate: bool = False,
) -> DiskStore:
    """Open a small store at a fixed time."""
    return DiskStore.open(
        path,
        capacity_bytes=capacity_bytes,
        extent_bytes=extent_bytes,
        recreate=recreate,
        clock=lambda: NOW_S,
    )


def bytes_at(address: int, num_bytes: int) -> memoryview:
    """Return the memory that an engine would be given."""
    return memoryview((ctypes.c_char * num_bytes).from_address(address))


def write_all(store: DiskStore, writes: RecordWrites | None = None) -> int:
    """Do record writes as the engine would, until none is left; return how many there were."""
    count = 0
    writes = store.record_writes() if writes is None else writes
    while len(writes) > 0:
        places = zip(writes.fds, writes.offsets, writes.addresses, writes.bytes, strict=True)
        for fd, offset, address, num_bytes in places:
            assert offset % 4096 == address % 4096 == num_bytes % 4096 == 0
            data = bytes_at(int(address), int(num_bytes))
            assert os.pwritev(int(fd), [data], int(offset)) == num_bytes
        store.record_writes_done(writes)
        count += len(writes)
        writes = store.record_writes()
    return count


def files_of(path: Path) -> dict[str, int]:
    """Return the sizes of the files in a directory by name."""
    return {entry.name: entry.stat().st_size for entry in path.iterdir()}

"""A read-only view of a store for people and for `kvx inspect`; needs no lock.

While another process has the store open its records change under the reader: a view is then a
sample, marked by `is_open_elsewhere`, in which a block may be missing or doubled.
Nothing is written.
"""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray

from kvx.cache.disk import directory
from kvx.cache.disk.files import extent_name, read_header, storage_errors
from kvx.cache.disk.format import (
    FORMAT_VERSION,
    ExtentHeader,
    ExtentState,
    Superblock,
    damaged,
    uuid_text,
)
from kvx.cache.disk.record import BlockRecords, RecordKind
from kvx.cache.disk.recovery import (
    RecoveryCounts,
    Scan,
    counts_of,
    joined,
    read_records,
    resolve,
    scan,
)
from kvx.errors import IncompatibleError, StorageError, UsageError

# Lower bounds: uses 0, 1, 2-3, 4-7, ... 128-255.
HEAT_BUCKETS: Final = (0, 1, 2, 4, 8, 16, 32, 64, 128)


@dataclass(frozen=True, slots=True, kw_only=True)
class ExtentDescription:
    """One extent file.

    Attributes:
        path: The file.
        slot_bytes: Bytes of a slot; 0 if the header is damaged.
        num_slots: Slots; 0 if the header is damaged.
        file_bytes: Size of the file.
        num_live: Valid live records, superseded and expired ones included.
        num_damaged: Torn, foreign and misplaced records.
        problem: Why the file cannot be used; empty if it can.
    """

    path: Path
    slot_bytes: int
    num_slots: int
    file_bytes: int
    num_live: int
    num_damaged: int
    problem: str


@dataclass(frozen=True, slots=True, kw_only=True)
class NamespaceDescription:
    """The blocks of one namespace.

    Attributes:
        fingerprint: 16 bytes.
        num_blocks: Blocks that a recovery would bring back.
        payload_bytes: Their bytes.
    """

    fingerprint: bytes
    num_blocks: int
    payload_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class StoreDescription:
    """What is in a store.

    Attributes:
        path: The directory.
        version: Format version.
        uuid: Identity, 16 bytes.
        created_s: Unix time of creation.
        capacity_bytes: Limit on the sum of all file sizes.
        extent_bytes: Nominal size of an extent.
        used_bytes: Bytes of all extent files.
        extents: The extent files, by number.
        counts: Slots by condition, as a recovery would count them now.
        namespaces: Most blocks first.
        heat_histogram: Blocks per bucket of HEAT_BUCKETS.
        oldest_s: Unix time at which the oldest block was stored; None without blocks.
        newest_s: Unix time at which the newest block was stored; None without blocks.
        is_open_elsewhere: Somebody has the store open: the numbers are a sample.
        holder_pid: Who, as far as the lock file says.
    """

    path: Path
    version: int
    uuid: bytes
    created_s: int
    capacity_bytes: int
    extent_bytes: int
    used_bytes: int
    extents: tuple[ExtentDescription, ...]
    counts: RecoveryCounts
    namespaces: tuple[NamespaceDescription, ...]
    heat_histogram: tuple[int, ...]
    oldest_s: int | None
    newest_s: int | None
    is_open_elsewhere: bool
    holder_pid: int | None


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockPlaces:
    """Blocks of one extent and where their payloads lie.

    Attributes:
        path: The extent file.
        offsets: (n,) int64, byte offsets of the payloads in it.
        records: Payload bytes, checksums, keys and the rest.
    """

    path: Path
    offsets: NDArray[np.int64]
    records: BlockRecords


def describe(path: str | os.PathLike[str], *, now_s: int) -> StoreDescription:
    """Describe a store from its files; reads all records, no payloads. Blocks.

    Args:
        path: The directory.
        now_s: Unix time, for what has expired.

    Raises:
        UsageError: There is no store.
        StorageError: The superblock is damaged. Damaged extents are described.
        IncompatibleError: It was written by another format version.
    """
    where = Path(path)
    superblock = _superblock(where)
    is_open = directory.is_locked(where)
    extents = []
    scans = []
    for position, number in enumerate(directory.extent_numbers(where)):
        found, described = _describe_extent(where / extent_name(number), superblock, position)
        scans.append(found)
        extents.append(described)
    found = joined(scans)
    resolution = resolve(found, now_s)
    live = found.records.take(resolution.live)
    return StoreDescription(
        path=where,
        version=FORMAT_VERSION,
        uuid=superblock.uuid,
        created_s=superblock.created_s,
        capacity_bytes=superblock.capacity_bytes,
        extent_bytes=superblock.extent_bytes,
        used_bytes=directory.OVERHEAD_BYTES + sum(extent.file_bytes for extent in extents),
        extents=tuple(extents),
        counts=counts_of(found, resolution),
        namespaces=_namespaces(live),
        heat_histogram=_heat_histogram(live),
        oldest_s=int(live.stored_at_s.min()) if len(live) else None,
        newest_s=int(live.stored_at_s.max()) if len(live) else None,
        is_open_elsewhere=is_open,
        holder_pid=directory.holder_pid(where) if is_open else None,
    )


def iter_blocks(path: str | os.PathLike[str]) -> Iterator[BlockPlaces]:
    """Yield the blocks of a store piece by piece, in the order of files and offsets. Blocks.

    These are all valid live records, superseded and expired ones included. Extents for which
    `describe` states a problem are left out.

    Args:
        path: The directory.

    Raises:
        UsageError: There is no store.
        StorageError: The superblock is damaged, or reading failed.
        IncompatibleError: It was written by another format version.
    """
    where = Path(path)
    superblock = _superblock(where)
    for number in directory.extent_numbers(where):
        extent_path = where / extent_name(number)
        with _open(extent_path) as file:
            try:
                header = _usable_header(file, extent_path, superblock)
            except (StorageError, IncompatibleError):
                continue  # `describe` reports it
            for first, packed in read_records(file.fileno(), header, extent_path):
                found = scan([(0, number, first, packed)])
                indices = found.indices[found.is_live]
                yield BlockPlaces(
                    path=extent_path,
                    offsets=header.payload_offset + indices * header.slot_bytes,
                    records=found.records.take(found.is_live),
                )


def _superblock(path: Path) -> Superblock:
    if not path.is_dir():
        raise UsageError(f"{path} is not a directory")
    superblock = directory.read_superblock(path)
    if superblock is None:
        raise UsageError(f"{path} holds no kvx store")
    return superblock


def _open(path: Path) -> FileIO:
    with storage_errors(path):
        flags = os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW
        file = FileIO(os.open(path, flags), "rb")
        # The owner writes past the kernel's cache, which may hold older records.
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    return file


def _usable_header(file: FileIO, path: Path, superblock: Superblock) -> ExtentHeader:
    header = read_header(file.fileno(), path)
    if header.uuid != superblock.uuid:
        raise damaged(str(path), f"it belongs to store {uuid_text(header.uuid)}")
    if header.state == ExtentState.RETIRED:
        raise StorageError(f"{path} was released; the next open removes it", key=str(path))
    return header


def _describe_extent(
    path: Path, superblock: Superblock, position: int
) -> tuple[Scan, ExtentDescription]:
    found = joined([])
    header = None
    num_bytes = 0
    problem = ""
    try:
        with _open(path) as file:
            num_bytes = os.fstat(file.fileno()).st_size
            header = _usable_header(file, path, superblock)
            found = scan(
                (position, header.number, first, packed)
                for first, packed in read_records(file.fileno(), header, path)
            )
    except (StorageError, IncompatibleError) as error:
        problem = str(error)
    return found, ExtentDescription(
        path=path,
        slot_bytes=header.slot_bytes if header else 0,
        num_slots=header.num_slots if header else 0,
        file_bytes=num_bytes,
        num_live=int(found.is_live.sum()),
        num_damaged=int(found.kinds[RecordKind.TORN :].sum()),
        problem=problem,
    )


def _namespaces(live: BlockRecords) -> tuple[NamespaceDescription, ...]:
    # As void, a fingerprint is one value to np.unique instead of 16.
    names = np.ascontiguousarray(live.namespaces).view("V16").reshape(-1)
    unique, inverse = np.unique(names, return_inverse=True)
    blocks = np.bincount(inverse, minlength=len(unique))
    num_bytes = np.bincount(inverse, weights=live.payload_bytes, minlength=len(unique))
    return tuple(
        NamespaceDescription(
            fingerprint=unique[row].tobytes(),
            num_blocks=int(blocks[row]),
            payload_bytes=int(num_bytes[row]),
        )
        for row in np.argsort(-blocks, kind="stable")
    )


def _heat_histogram(live: BlockRecords) -> tuple[int, ...]:
    buckets = np.searchsorted(HEAT_BUCKETS, live.heat, side="right") - 1
    return tuple(int(n) for n in np.bincount(buckets, minlength=len(HEAT_BUCKETS)))

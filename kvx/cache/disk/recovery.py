"""What survived a restart: a scan of the records, and which of several records of a key counts.

Payloads are not read. A block that was being replaced when the process died has the old record and
the new payload; the checksum in the record says so when the block is read.
"""

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray

from kvx.cache.disk.extent import Extent
from kvx.cache.disk.files import aligned_empty, storage_errors
from kvx.cache.disk.format import BLOCK_ALIGNMENT, RECORD_BYTES, ExtentHeader, damaged
from kvx.cache.disk.record import (
    RECORD_DTYPE,
    BlockRecords,
    RecordKind,
    classify_records,
    unpack_records,
)

# 8 MiB a read; a multiple of the records of a page, so that reads stay aligned.
RECORDS_PER_READ: Final = 65536
HEAT_HALF_LIFE_S: Final = 3600
Progress = Callable[[int, int], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class RecoveryCounts:
    """How many slots were found in which condition; they add up to all slots.

    Attributes:
        live: Blocks that are back.
        dead: Dropped by the user.
        empty: Never written.
        expired: Live, but past their expiry.
        superseded: Live, but a newer record of the same key exists, live or dead.
        torn: The record's checksum does not match.
        foreign: Neither zeros nor a record of this version.
        misplaced: A valid record of another slot or extent.
    """

    live: int = 0
    dead: int = 0
    empty: int = 0
    expired: int = 0
    superseded: int = 0
    torn: int = 0
    foreign: int = 0
    misplaced: int = 0

    @property
    def damaged(self) -> int:
        """Records that are neither valid nor empty."""
        return self.torn + self.foreign + self.misplaced


@dataclass(frozen=True, slots=True, kw_only=True)
class RecoveredPool:
    """The blocks of one slot size that survived, coldest first (see `heat_order`).

    Attributes:
        slots: (n,) int64, slot ids.
        records: Keys, generations, checksums and the rest, n of each.
    """

    slots: NDArray[np.int64]
    records: BlockRecords


@dataclass(frozen=True, slots=True, kw_only=True)
class Recovered:
    """What `DiskStore.recover` found.

    Attributes:
        pools: Slot size in bytes -> its blocks; one entry for each slot size that has extents.
        counts: Slots of the whole store by condition.
    """

    pools: dict[int, RecoveredPool]
    counts: RecoveryCounts


@dataclass(frozen=True, slots=True, kw_only=True)
class Scan:
    """The valid records, live and dead, of some extents, in the order they were read.

    Attributes:
        extents: (n,) int32, position of the extent in the list that was scanned.
        indices: (n,) int64, slot indices in the extent.
        is_live: (n,) bool.
        sequences: (n,) uint64.
        records: The fields.
        kinds: (6,) int64, number of slots of each RecordKind.
    """

    extents: NDArray[np.int32]
    indices: NDArray[np.int64]
    is_live: NDArray[np.bool_]
    sequences: NDArray[np.uint64]
    records: BlockRecords
    kinds: NDArray[np.int64]


@dataclass(frozen=True, slots=True, kw_only=True)
class Resolution:
    """Which rows of a scan count.

    Attributes:
        live: (n,) int64, rows of the blocks that count, coldest first.
        superseded: (k,) int64, live rows that a newer row of their key hides.
        expired: (m,) int64, live rows past their expiry.
    """

    live: NDArray[np.int64]
    superseded: NDArray[np.int64]
    expired: NDArray[np.int64]


def recover_extents(
    extents: Sequence[Extent], now_s: int, progress: Progress | None
) -> tuple[Recovered, int]:
    """Read the records of extents into their mirrors and decide which blocks are back.

    What is superseded or expired is dead in the mirrors afterwards.

    Args:
        extents: All extents of a store.
        now_s: Unix time.
        progress: Called with (records read, records in all).

    Returns:
        (the survivors, the highest sequence found or 0)

    Raises:
        StorageError: Reading failed.
    """
    total = sum(extent.num_slots for extent in extents)
    pieces = (
        (position, extent.number, first, packed)
        for position, extent in enumerate(extents)
        for first, packed in read_records(extent.fd, extent.header, extent.path, extent.mirror)
    )
    found = scan(pieces, progress and (lambda done: progress(done, total)))
    resolution = resolve(found, now_s)
    gone = np.concatenate([resolution.superseded, resolution.expired])
    for position, extent in enumerate(extents):
        extent.kill_records(found.indices[gone[found.extents[gone] == position]])
    first_slots = np.array([extent.first_slot for extent in extents], dtype=np.int64)
    slot_bytes = np.array([extent.slot_bytes for extent in extents], dtype=np.int64)
    pools = {}
    for size in sorted({extent.slot_bytes for extent in extents}):
        rows = resolution.live[slot_bytes[found.extents[resolution.live]] == size]
        pools[size] = RecoveredPool(
            slots=first_slots[found.extents[rows]] + found.indices[rows],
            records=found.records.take(rows),
        )
    newest = int(found.sequences.max()) if len(found.sequences) else 0
    return Recovered(pools=pools, counts=counts_of(found, resolution)), newest


def read_records(
    fd: int, header: ExtentHeader, path: Path, mirror: NDArray[np.uint8] | None = None
) -> Iterator[tuple[int, NDArray[np.void]]]:
    """Read the records of an extent piece by piece.

    Args:
        fd: The open file.
        header: Its header.
        path: The file, for messages.
        mirror: (records_bytes,) uint8, page-aligned, to read into; None for scratch memory that
            the next step overwrites.

    Yields:
        (index of the first one, records of RECORD_DTYPE)

    Raises:
        StorageError: The device failed, or the file ended early.
    """
    scratch = aligned_empty(min(header.records_bytes, RECORDS_PER_READ * RECORD_BYTES))
    for first in range(0, header.num_slots, RECORDS_PER_READ):
        start = first * RECORD_BYTES
        num_bytes = min(header.records_bytes - start, RECORDS_PER_READ * RECORD_BYTES)
        target = scratch[:num_bytes] if mirror is None else mirror[start : start + num_bytes]
        _read_exactly(fd, target, header.records_offset + start, path)
        count = min(header.num_slots - first, RECORDS_PER_READ)
        yield first, target[: count * RECORD_BYTES].view(RECORD_DTYPE)


def scan(
    pieces: Iterable[tuple[int, int, int, NDArray[np.void]]],
    progress: Callable[[int], None] | None = None,
) -> Scan:
    """Collect the valid records of extents, and blank the others in the memory they were read to.

    Blank, because nothing may later seal a damaged record by changing its heat.

    Args:
        pieces: (position of the extent, extent number, index of the first record, records).
        progress: Called after every piece with the number of records so far.
    """
    parts: list[Scan] = []
    done = 0
    for position, number, first, packed in pieces:
        kinds = classify_records(packed, first_index=first, extent_number=number)
        is_live = kinds == RecordKind.LIVE
        rows = np.flatnonzero(is_live | (kinds == RecordKind.DEAD))
        packed[kinds >= RecordKind.TORN] = np.zeros((), dtype=RECORD_DTYPE)
        valid = packed[rows]
        parts.append(
            Scan(
                extents=np.full(len(rows), position, dtype=np.int32),
                indices=rows + first,
                is_live=is_live[rows],
                sequences=valid["sequence"].copy(),
                records=unpack_records(valid),
                kinds=np.bincount(kinds, minlength=len(RecordKind)),
            )
        )
        done += len(packed)
        if progress is not None:
            progress(done)
    return joined(parts)


def joined(parts: Sequence[Scan]) -> Scan:
    """Return several scans as one."""
    if not parts:
        parts = [_EMPTY]
    records = BlockRecords(
        **{
            f.name: np.concatenate([getattr(part.records, f.name) for part in parts])
            for f in fields(BlockRecords)
        }
    )
    return Scan(
        extents=np.concatenate([part.extents for part in parts]),
        indices=np.concatenate([part.indices for part in parts]),
        is_live=np.concatenate([part.is_live for part in parts]),
        sequences=np.concatenate([part.sequences for part in parts]),
        records=records,
        kinds=np.sum([part.kinds for part in parts], axis=0),
    )


def resolve(found: Scan, now_s: int) -> Resolution:
    """Decide which records count: the newest of each key, if it is live and not expired. Pure.

    Args:
        found: Valid records.
        now_s: Unix time.
    """
    is_newest = _newest_of_key(found.records.keys, found.sequences)
    expiry = found.records.expiry_s
    is_expired = found.is_live & is_newest & (expiry != 0) & (expiry <= np.uint64(now_s))
    live = np.flatnonzero(found.is_live & is_newest & ~is_expired)
    order = heat_order(
        found.records.heat[live], found.records.last_used_s[live], found.sequences[live], now_s
    )
    return Resolution(
        live=live[order],
        superseded=np.flatnonzero(found.is_live & ~is_newest),
        expired=np.flatnonzero(is_expired),
    )


def heat_order(
    heat: NDArray[np.uint8],
    last_used_s: NDArray[np.uint64],
    sequences: NDArray[np.uint64],
    now_s: int,
) -> NDArray[np.int64]:
    """Return the order of blocks from coldest to hottest. Pure.

    The frequency is halved for every hour since the last use; among equals the one used longer ago
    is colder, then the one stored earlier. A last use in the future counts as now.

    Args:
        heat: (n,) uint8, use frequency.
        last_used_s: (n,) uint64, Unix time.
        sequences: (n,) uint64.
        now_s: Unix time.

    Returns:
        (n,) int64, positions.
    """
    now = np.uint64(now_s)
    used = np.minimum(last_used_s, now)
    halvings = np.minimum((now - used) // np.uint64(HEAT_HALF_LIFE_S), np.uint64(8))
    decayed = heat.astype(np.uint64) >> halvings
    return np.lexsort((sequences, used, decayed))


def counts_of(found: Scan, resolution: Resolution) -> RecoveryCounts:
    """Return how many slots were found in which condition."""
    return RecoveryCounts(
        live=len(resolution.live),
        dead=int(found.kinds[RecordKind.DEAD]),
        empty=int(found.kinds[RecordKind.EMPTY]),
        expired=len(resolution.expired),
        superseded=len(resolution.superseded),
        torn=int(found.kinds[RecordKind.TORN]),
        foreign=int(found.kinds[RecordKind.FOREIGN]),
        misplaced=int(found.kinds[RecordKind.MISPLACED]),
    )


def _read_exactly(fd: int, target: NDArray[np.uint8], offset: int, path: Path) -> None:
    done = 0
    while done < len(target):
        with storage_errors(path, offset=offset + done):
            num_bytes = os.preadv(fd, [target[done:].data], offset + done)
        # O_DIRECT goes on only from an aligned place; less than that is the end of the file.
        num_bytes -= num_bytes % BLOCK_ALIGNMENT
        if num_bytes == 0:
            raise damaged(str(path), "it ends inside the records", offset=offset + done)
        done += num_bytes


def _newest_of_key(keys: NDArray[np.uint8], sequences: NDArray[np.uint64]) -> NDArray[np.bool_]:
    """Return for each row whether no other row of its key has a higher sequence."""
    halves = np.ascontiguousarray(keys).view(np.uint64).reshape(-1, 2)
    # Keys are digests: rows that share a first half are rare, and only they are sorted in full.
    order = np.argsort(halves[:, 0])
    ordered = halves[order, 0]
    is_same = ordered[1:] == ordered[:-1]
    is_candidate = np.zeros(len(order), dtype=np.bool_)
    is_candidate[1:] |= is_same
    is_candidate[:-1] |= is_same
    rows = order[is_candidate]
    rows = rows[np.lexsort((sequences[rows], halves[rows, 1], halves[rows, 0]))]
    is_newest = np.ones(len(order), dtype=np.bool_)
    is_newest[rows[:-1]] = (halves[rows[1:]] != halves[rows[:-1]]).any(axis=1)
    return is_newest


_EMPTY: Final = Scan(
    extents=np.empty(0, dtype=np.int32),
    indices=np.empty(0, dtype=np.int64),
    is_live=np.empty(0, dtype=np.bool_),
    sequences=np.empty(0, dtype=np.uint64),
    records=unpack_records(np.empty(0, dtype=RECORD_DTYPE)),
    kinds=np.zeros(len(RecordKind), dtype=np.int64),
)

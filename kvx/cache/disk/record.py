"""The 128-byte record that says which block a slot holds, packed and verified n at a time.

A record names its own place (extent number, slot index), so that a page written to the wrong place
is as invalid as a torn one. The layout is fixed by `docs/formats/nvme.md`.
"""

from dataclasses import dataclass, fields
from enum import IntEnum
from typing import Final, Self

import numpy as np
from numpy.typing import NDArray

from kvx.cache.disk.checksum import crc64_rows
from kvx.cache.disk.format import RECORD_BYTES
from kvx.errors import UsageError

RECORD_MAGIC: Final = 0x4252_564B  # "KVRB" in the file
KEY_BYTES: Final = 16
_SEALED_BYTES: Final = RECORD_BYTES - 8

RECORD_DTYPE: Final = np.dtype(
    [
        ("magic", "<u4"),
        ("state", "<u4"),
        ("key", "u1", (KEY_BYTES,)),
        ("generation", "<u4"),
        ("payload_bytes", "<u4"),
        ("checksum", "<u8"),
        ("namespace", "u1", (16,)),
        ("heat", "u1"),
        ("zero0", "u1", (3,)),
        ("index", "<u4"),
        ("stored_at_s", "<u8"),
        ("last_used_s", "<u8"),
        ("expiry_s", "<u8"),
        ("sequence", "<u8"),
        ("extent", "<u4"),
        ("zero1", "u1", (4,)),
        ("tenant", "<u8"),
        ("zero2", "u1", (8,)),
        ("record_checksum", "<u8"),
    ]
)
assert RECORD_DTYPE.itemsize == RECORD_BYTES


class RecordState(IntEnum):
    """What the writer meant by a record."""

    LIVE = 1
    DEAD = 2  # the block was dropped


class RecordKind(IntEnum):
    """What a reader found in the place of a record."""

    EMPTY = 0  # 128 zeros: never written
    LIVE = 1
    DEAD = 2
    TORN = 3  # right magic, wrong checksum
    FOREIGN = 4  # wrong magic, or a state this version does not know
    MISPLACED = 5  # valid, but written for another slot or extent


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockRecords:
    """The records of n blocks, one array per field.

    Attributes:
        keys: (n, 16) uint8.
        payload_bytes: (n,) uint32, at most slot_bytes.
        checksums: (n,) uint64, CRC-64/NVME of the payload, opaque here.
        generations: (n,) uint32, the slot's generation.
        namespaces: (n, 16) uint8, fingerprints.
        tenants: (n,) uint64, digest of the name of the tenant whose quota it counts against.
        heat: (n,) uint8, use frequency.
        stored_at_s: (n,) uint64, Unix time.
        last_used_s: (n,) uint64, Unix time.
        expiry_s: (n,) uint64, Unix time from which the block is gone; 0 never.
    """

    keys: NDArray[np.uint8]
    payload_bytes: NDArray[np.uint32]
    checksums: NDArray[np.uint64]
    generations: NDArray[np.uint32]
    namespaces: NDArray[np.uint8]
    tenants: NDArray[np.uint64]
    heat: NDArray[np.uint8]
    stored_at_s: NDArray[np.uint64]
    last_used_s: NDArray[np.uint64]
    expiry_s: NDArray[np.uint64]

    def __len__(self) -> int:
        """Return n."""
        return len(self.keys)

    def take(self, rows: NDArray[np.int64] | NDArray[np.bool_]) -> Self:
        """Return the chosen rows, copied."""
        return type(self)(**{f.name: getattr(self, f.name)[rows] for f in fields(self)})

    def check(self, num_rows: int, slot_bytes: int) -> None:
        """Raise UsageError unless every array fits `num_rows` slots of `slot_bytes`."""
        for field in fields(self):
            array = getattr(self, field.name)
            name, sub = _COLUMNS[field.name]
            expected = (num_rows, *sub.shape)
            if array.shape != expected or array.dtype != sub.base:
                raise UsageError(
                    f"{field.name} ({name} of the record) is {array.dtype} {array.shape}, "
                    f"it must be {sub.base} {expected}"
                )
        if num_rows > 0 and not 0 < self.payload_bytes.min() <= self.payload_bytes.max() <= (
            slot_bytes
        ):
            raise UsageError(
                f"payload_bytes go from {self.payload_bytes.min()} to {self.payload_bytes.max()}; "
                f"a slot holds 1 to {slot_bytes}"
            )


def _column_dtypes() -> dict[str, tuple[str, np.dtype[np.void]]]:
    plurals = {
        "key": "keys",
        "checksum": "checksums",
        "generation": "generations",
        "namespace": "namespaces",
        "tenant": "tenants",
    }
    assert RECORD_DTYPE.names is not None
    return {plurals.get(name, name): (name, RECORD_DTYPE[name]) for name in RECORD_DTYPE.names}


# Field of BlockRecords -> (field of the record, its dtype).
_COLUMNS: Final = _column_dtypes()


def pack_records(
    records: BlockRecords,
    indices: NDArray[np.int64],
    *,
    extent_number: int,
    sequences: NDArray[np.uint64],
) -> NDArray[np.void]:
    """Return sealed live records.

    Args:
        records: What the slots hold.
        indices: (n,) int64, the slots' indices in the extent.
        extent_number: The extent they lie in.
        sequences: (n,) uint64; of two records of one key the one with the higher is newer.

    Returns:
        (n,) of RECORD_DTYPE.
    """
    packed = np.zeros(len(records), dtype=RECORD_DTYPE)
    packed["magic"] = RECORD_MAGIC
    packed["state"] = RecordState.LIVE
    for field in fields(records):
        packed[_COLUMNS[field.name][0]] = getattr(records, field.name)
    packed["index"] = indices
    packed["extent"] = extent_number
    packed["sequence"] = sequences
    seal_records(packed)
    return packed


def kill_records(packed: NDArray[np.void]) -> None:
    """Turn live records into dead ones in place and seal them.

    The sequence stays: a dead record hides what its block had hidden, older records of the key, and
    not the record of a newer copy elsewhere.
    """
    packed["state"] = RecordState.DEAD
    seal_records(packed)


def seal_records(packed: NDArray[np.void]) -> None:
    """Write the checksums of records in place."""
    packed["record_checksum"] = crc64_rows(_rows(packed)[:, :_SEALED_BYTES])


def unpack_records(packed: NDArray[np.void]) -> BlockRecords:
    """Return the fields of records that `classify_records` found valid, copied."""
    columns = {f.name: packed[_COLUMNS[f.name][0]].copy() for f in fields(BlockRecords)}
    return BlockRecords(**columns)


def classify_records(
    packed: NDArray[np.void], *, first_index: int, extent_number: int
) -> NDArray[np.uint8]:
    """Say of each record what it is.

    Args:
        packed: (n,) of RECORD_DTYPE, C-contiguous, consecutive in an extent.
        first_index: Index in the extent of the first one.
        extent_number: The extent they were read from.

    Returns:
        (n,) uint8 of RecordKind.
    """
    kinds = np.zeros(len(packed), dtype=np.uint8)
    written = np.flatnonzero(packed.view(np.uint64).reshape(-1, RECORD_BYTES // 8).any(axis=1))
    found = packed if len(written) == len(packed) else packed[written]
    kind = np.full(len(found), RecordKind.FOREIGN, dtype=np.uint8)
    for state in RecordState:
        kind[found["state"] == state] = RecordKind[state.name]
    in_place = (found["index"] == first_index + written) & (found["extent"] == extent_number)
    kind[(kind != RecordKind.FOREIGN) & ~in_place] = RecordKind.MISPLACED
    # Only a record whose checksum holds may claim to be anything but torn, and only one with
    # the magic may claim even that.
    sealed = found["record_checksum"] == crc64_rows(_rows(found)[:, :_SEALED_BYTES])
    kind[~sealed] = RecordKind.TORN
    kind[found["magic"] != RECORD_MAGIC] = RecordKind.FOREIGN
    kinds[written] = kind
    return kinds


def _rows(packed: NDArray[np.void]) -> NDArray[np.uint8]:
    return packed.view(np.uint8).reshape(-1, RECORD_BYTES)

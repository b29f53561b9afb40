"""The bytes of the NVMe tier: superblock, extent header and block record.

`docs/formats/nvme.md` is the manual; this file packs and verifies and does no I/O. Everything is
little-endian. The superblock and the header are 4096 bytes whose first 512 hold all that is not
zero, their checksum included, so that one sector write replaces them. A record is 128 bytes and
never crosses a sector.
"""

import uuid as uuid_module
from dataclasses import dataclass
from enum import IntEnum
from typing import Final

import numpy as np
from numpy.typing import NDArray

from kvx.cache.disk.checksum import crc64
from kvx.errors import IncompatibleError, StorageError, UsageError

FORMAT_VERSION: Final = 1
SECTOR_BYTES: Final = 512
BLOCK_ALIGNMENT: Final = 4096
HEADER_BYTES: Final = 4096
RECORD_BYTES: Final = 128
RECORDS_PER_PAGE: Final = BLOCK_ALIGNMENT // RECORD_BYTES
SLOT_BYTES_MIN: Final = 4096
SLOT_BYTES_MAX: Final = 64 << 20
EXTENT_BYTES_MIN: Final = 64 << 20
EXTENT_BYTES_MAX: Final = 16 << 30
EXTENT_NUMBER_MAX: Final = 999_999

STORE_MAGIC: Final = b"KVXSTORE"
EXTENT_MAGIC: Final = b"KVXEXTNT"

# For every version, for ever: magic at 0, version at 8, checksum at 504 over the other 4088 bytes.
# A reader can so tell a damaged header from one of another version.
_SEAL_OFFSET: Final = 504

_SUPERBLOCK_DTYPE: Final = np.dtype(
    [
        ("magic", "S8"),
        ("version", "<u4"),
        ("zero0", "<u4"),
        ("uuid", "u1", (16,)),
        ("created_s", "<u8"),
        ("capacity_bytes", "<u8"),
        ("extent_bytes", "<u8"),
        ("zero1", "u1", (448,)),
        ("checksum", "<u8"),
        ("zero2", "u1", (3584,)),
    ]
)
_HEADER_DTYPE: Final = np.dtype(
    [
        ("magic", "S8"),
        ("version", "<u4"),
        ("state", "<u4"),
        ("uuid", "u1", (16,)),
        ("number", "<u4"),
        ("ordinal", "<u4"),
        ("slot_bytes", "<u8"),
        ("num_slots", "<u8"),
        ("records_offset", "<u8"),
        ("payload_offset", "<u8"),
        ("created_s", "<u8"),
        ("zero1", "u1", (424,)),
        ("checksum", "<u8"),
        ("zero2", "u1", (3584,)),
    ]
)
assert _SUPERBLOCK_DTYPE.itemsize == _HEADER_DTYPE.itemsize == HEADER_BYTES


class ExtentState(IntEnum):
    """Whether an extent's content counts."""

    LIVE = 1
    RETIRED = 2  # released; only the removal of the file is outstanding


@dataclass(frozen=True, slots=True)
class Superblock:
    """What `kvx.store` says.

    Attributes:
        uuid: (16 bytes) identity of the store; every extent repeats it.
        created_s: Unix time of creation.
        capacity_bytes: Limit on the sum of all file sizes.
        extent_bytes: Nominal size of an extent file.
    """

    uuid: bytes
    created_s: int
    capacity_bytes: int
    extent_bytes: int


@dataclass(frozen=True, slots=True)
class ExtentHeader:
    """What the first 4096 bytes of an extent file say.

    Attributes:
        uuid: (16 bytes) the store it belongs to.
        number: The number in its file name, unique in the store.
        ordinal: Its place among the extents of its slot size; decides its slot ids.
        slot_bytes: Bytes of one slot, a multiple of 4096.
        num_slots: Slots in this file.
        created_s: Unix time of creation.
        state: Whether its content counts.
    """

    uuid: bytes
    number: int
    ordinal: int
    slot_bytes: int
    num_slots: int
    created_s: int
    state: ExtentState = ExtentState.LIVE

    @property
    def records_offset(self) -> int:
        """Byte offset of record 0 in the file."""
        return HEADER_BYTES

    @property
    def records_bytes(self) -> int:
        """Bytes of the records area, padded to 4096."""
        return records_bytes(self.num_slots)

    @property
    def payload_offset(self) -> int:
        """Byte offset of slot 0 in the file."""
        return HEADER_BYTES + self.records_bytes

    @property
    def file_bytes(self) -> int:
        """Size of the file."""
        return extent_file_bytes(self.slot_bytes, self.num_slots)


def records_bytes(num_slots: int) -> int:
    """Return the bytes of a records area of `num_slots` records, padded to 4096."""
    return -(-num_slots * RECORD_BYTES // BLOCK_ALIGNMENT) * BLOCK_ALIGNMENT


def extent_file_bytes(slot_bytes: int, num_slots: int) -> int:
    """Return the size of an extent file of `num_slots` slots."""
    return HEADER_BYTES + records_bytes(num_slots) + num_slots * slot_bytes


def slots_that_fit(slot_bytes: int, file_bytes: int) -> int:
    """Return the largest number of slots whose extent file is at most `file_bytes`; 0 if none."""
    room = file_bytes - HEADER_BYTES
    num_slots = max(0, room // (slot_bytes + RECORD_BYTES))
    # The padding of the records area can cost slots; never more than one page of it.
    while num_slots > 0 and extent_file_bytes(slot_bytes, num_slots) > file_bytes:
        num_slots -= 1
    return num_slots


def slots_per_extent(slot_bytes: int, extent_bytes: int) -> int:
    """Return the slots of a full extent: the stride of slot ids between ordinals, at least 1."""
    return max(1, slots_that_fit(slot_bytes, extent_bytes))


def default_extent_bytes(capacity_bytes: int) -> int:
    """Return a 64th of the capacity, but between 64 MiB and 16 GiB."""
    return max(EXTENT_BYTES_MIN, min(EXTENT_BYTES_MAX, capacity_bytes // 64))


def check_slot_bytes(slot_bytes: int) -> None:
    """Raise UsageError unless `slot_bytes` is a slot size: a multiple of 4096 up to 64 MiB."""
    in_range = SLOT_BYTES_MIN <= slot_bytes <= SLOT_BYTES_MAX
    if not in_range or slot_bytes % BLOCK_ALIGNMENT != 0:
        raise UsageError(
            f"slot_bytes is {slot_bytes}; it must be a multiple of {BLOCK_ALIGNMENT} between "
            f"{SLOT_BYTES_MIN} and {SLOT_BYTES_MAX}"
        )


def pack_superblock(superblock: Superblock) -> bytes:
    """Return the 4096 bytes of `kvx.store`."""
    fields = np.zeros((), dtype=_SUPERBLOCK_DTYPE)
    fields["magic"] = STORE_MAGIC
    fields["version"] = FORMAT_VERSION
    fields["uuid"] = np.frombuffer(superblock.uuid, dtype=np.uint8)
    fields["created_s"] = superblock.created_s
    fields["capacity_bytes"] = superblock.capacity_bytes
    fields["extent_bytes"] = superblock.extent_bytes
    return _seal(fields)


def unpack_superblock(data: bytes, path: str) -> Superblock:
    """Verify and return what `kvx.store` says.

    Args:
        data: The content of the file.
        path: The file, for messages.

    Raises:
        StorageError: It is damaged.
        IncompatibleError: It was written by another format version.
    """
    _check_sealed(data, STORE_MAGIC, path)
    fields = np.frombuffer(data, dtype=_SUPERBLOCK_DTYPE)[0]
    return Superblock(
        uuid=fields["uuid"].tobytes(),
        created_s=int(fields["created_s"]),
        capacity_bytes=int(fields["capacity_bytes"]),
        extent_bytes=int(fields["extent_bytes"]),
    )


def pack_header(header: ExtentHeader) -> bytes:
    """Return the first 4096 bytes of an extent file."""
    fields = np.zeros((), dtype=_HEADER_DTYPE)
    fields["magic"] = EXTENT_MAGIC
    fields["version"] = FORMAT_VERSION
    fields["state"] = header.state
    fields["uuid"] = np.frombuffer(header.uuid, dtype=np.uint8)
    fields["number"] = header.number
    fields["ordinal"] = header.ordinal
    fields["slot_bytes"] = header.slot_bytes
    fields["num_slots"] = header.num_slots
    fields["records_offset"] = header.records_offset
    fields["payload_offset"] = header.payload_offset
    fields["created_s"] = header.created_s
    return _seal(fields)


def unpack_header(data: bytes, path: str) -> ExtentHeader:
    """Verify and return an extent header.

    Args:
        data: The first 4096 bytes of the file, fewer if it has fewer.
        path: The file, for messages.

    Raises:
        StorageError: It is damaged.
        IncompatibleError: It was written by another format version.
    """
    _check_sealed(data, EXTENT_MAGIC, path)
    fields = np.frombuffer(data, dtype=_HEADER_DTYPE)[0]
    try:
        header = ExtentHeader(
            uuid=fields["uuid"].tobytes(),
            number=int(fields["number"]),
            ordinal=int(fields["ordinal"]),
            slot_bytes=int(fields["slot_bytes"]),
            num_slots=int(fields["num_slots"]),
            created_s=int(fields["created_s"]),
            state=ExtentState(int(fields["state"])),
        )
        check_slot_bytes(header.slot_bytes)
    except ValueError as error:
        raise damaged(path, f"its header is sealed but senseless: {error}") from error
    stated = (int(fields["records_offset"]), int(fields["payload_offset"]))
    if header.num_slots < 1 or stated != (header.records_offset, header.payload_offset):
        raise damaged(path, f"its header states {header.num_slots} slots at offsets {stated}")
    return header


def damaged(path: str, why: str, *, offset: int = 0) -> StorageError:
    """Return the error for a file that cannot be used, with the way out."""
    return StorageError(
        f"{path} is damaged: {why}; open the store with recreate=True to rebuild it as empty",
        key=path,
        offset=offset,
    )


def uuid_text(uuid: bytes) -> str:
    """Return a store's uuid as people write it."""
    return str(uuid_module.UUID(bytes=uuid))


def _seal(fields: NDArray[np.void]) -> bytes:
    data = bytearray(fields.tobytes())
    data[_SEAL_OFFSET : _SEAL_OFFSET + 8] = _seal_of(data).to_bytes(8, "little")
    return bytes(data)


def _seal_of(data: bytes | bytearray) -> int:
    return crc64(bytes(data[:_SEAL_OFFSET]) + bytes(data[_SEAL_OFFSET + 8 :]))


def _check_sealed(data: bytes, magic: bytes, path: str) -> None:
    if len(data) != HEADER_BYTES:
        raise damaged(path, f"{len(data)} of its {HEADER_BYTES} header bytes are there")
    if data[:8] != magic:
        raise damaged(path, f"it starts with {data[:8]!r}, not {magic!r}")
    stored = int.from_bytes(data[_SEAL_OFFSET : _SEAL_OFFSET + 8], "little")
    computed = _seal_of(data)
    if stored != computed:
        raise damaged(path, f"its header's checksum is {computed:#x}, it should be {stored:#x}")
    version = int.from_bytes(data[8:12], "little")
    if version != FORMAT_VERSION:
        raise IncompatibleError(
            f"{path} has format version {version}, this kvx reads and writes {FORMAT_VERSION}; "
            "use the kvx that wrote it, or another directory",
            ours=FORMAT_VERSION,
            theirs=version,
        )

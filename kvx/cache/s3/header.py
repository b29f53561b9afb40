"""What an object of the S3 tier says of itself: its shape, its header and its footer.

`docs/formats/object.md` is the manual; this file packs and verifies and does no I/O.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import numpy as np

from kvx.cache.s3.names import FORMAT_VERSION, KEY_BYTES, SEAL_ID_BYTES
from kvx.cache.s3.seal import SALT_BYTES, TAG_BYTES
from kvx.errors import CorruptBlock, IncompatibleError, UsageError
from kvx.namespace import BLOCK_BYTES_MAX, BLOCK_BYTES_MIN
from kvx_ext import _core

if TYPE_CHECKING:
    import numpy.typing as npt

Body = bytes | bytearray | memoryview | np.ndarray[tuple[int, ...], np.dtype[np.uint8]]

HEADER_BYTES: Final = 128
HEAD_BYTES: Final = 64
ALIGNMENT: Final = 64
ENTRY_BYTES: Final = 40
TRAILER_BYTES: Final = 32
NUM_BLOCKS_MAX: Final = 4096
# What S3 takes in one PUT.
OBJECT_BYTES_MAX: Final = 5 << 30

HEADER_MAGIC: Final = b"KVXOBJCT"
TRAILER_MAGIC: Final = b"KVXOBEND"
_FLAG_SEALED: Final = 1
_ALL_ONES: Final = 0xFFFF_FFFF_FFFF_FFFF

# For every version, for ever: magic at 0, version at 8, and a checksum of all that is before it in
# the last 8 of these bytes. So damage is told apart from another version.
_HEADER_DTYPE: Final = np.dtype(
    [
        ("magic", "S8"),
        ("version", "<u4"),
        ("flags", "<u4"),
        ("num_blocks", "<u4"),
        ("block_bytes", "<u4"),
        ("first_block", "<u8"),
        ("public_id", "u1", (KEY_BYTES,)),
        ("last_key", "u1", (KEY_BYTES,)),
        ("stored_at_s", "<u8"),
        ("expiry_s", "<u8"),
        ("salt", "u1", (SALT_BYTES,)),
        ("seal_id", "u1", (SEAL_ID_BYTES,)),
        ("object_bytes", "<u8"),
        ("zero", "<u8"),
        ("crc64", "<u8"),
    ]
)
_ENTRY_DTYPE: Final = np.dtype(
    [
        ("key", "u1", (KEY_BYTES,)),
        ("offset", "<u8"),
        ("stored_bytes", "<u8"),
        ("checksum", "<u8"),
    ]
)
_TRAILER_DTYPE: Final = np.dtype(
    [
        ("magic", "S8"),
        ("version", "<u4"),
        ("num_blocks", "<u4"),
        ("footer_bytes", "<u8"),
        ("crc64", "<u8"),
    ]
)
assert _HEADER_DTYPE.itemsize == HEADER_BYTES
assert _ENTRY_DTYPE.itemsize == ENTRY_BYTES
assert _TRAILER_DTYPE.itemsize == TRAILER_BYTES


@dataclass(frozen=True, slots=True)
class GroupShape:
    """How the objects of a namespace are made; all else about places follows from it.

    Attributes:
        num_blocks: Blocks in an object, 1 to 4096.
        block_bytes: Canonical bytes of a block, 4 KiB to 64 MiB.
        is_sealed: Whether blocks are encrypted.
    """

    num_blocks: int
    block_bytes: int
    is_sealed: bool = False

    def __post_init__(self) -> None:
        """Refuse what no object can be.

        Raises:
            UsageError: Says the value and what is accepted.
        """
        if not 1 <= self.num_blocks <= NUM_BLOCKS_MAX:
            raise UsageError(f"{self.num_blocks} blocks in an object; 1 to {NUM_BLOCKS_MAX} fit")
        if not BLOCK_BYTES_MIN <= self.block_bytes <= BLOCK_BYTES_MAX:
            raise UsageError(
                f"block_bytes is {self.block_bytes}; {BLOCK_BYTES_MIN} to {BLOCK_BYTES_MAX} fit"
            )
        if self.object_bytes > OBJECT_BYTES_MAX:
            raise UsageError(
                f"{self.num_blocks} blocks of {self.block_bytes} bytes are an object of "
                f"{self.object_bytes} bytes; S3 takes {OBJECT_BYTES_MAX}: put fewer blocks into one"
            )

    @property
    def stored_bytes(self) -> int:
        """Bytes of a block as it is stored, without its frame's head."""
        return self.block_bytes + (TAG_BYTES if self.is_sealed else 0)

    @property
    def frame_bytes(self) -> int:
        """Bytes from one frame to the next: head, block as stored, zeros up to 64."""
        return -(-(HEAD_BYTES + self.stored_bytes) // ALIGNMENT) * ALIGNMENT

    @property
    def footer_bytes(self) -> int:
        """Bytes of the table and the trailer behind it."""
        return ENTRY_BYTES * self.num_blocks + TRAILER_BYTES

    @property
    def object_bytes(self) -> int:
        """Size of an object."""
        return HEADER_BYTES + self.num_blocks * self.frame_bytes + self.footer_bytes

    def span(self, first: int, count: int) -> tuple[int, int]:
        """Return (start, size_bytes) of `count` frames from frame `first` on."""
        if not (0 <= first < self.num_blocks and 1 <= count <= self.num_blocks - first):
            raise UsageError(
                f"frames {first} to {first + count} are not within an object of {self.num_blocks}"
            )
        return HEADER_BYTES + first * self.frame_bytes, count * self.frame_bytes

    @property
    def footer_span(self) -> tuple[int, int]:
        """(start, size_bytes) of the footer."""
        return self.object_bytes - self.footer_bytes, self.footer_bytes


@dataclass(frozen=True, slots=True)
class GroupFacts:
    """What a group of blocks is, beside its bytes.

    Attributes:
        public_id: (16 bytes) of its namespace.
        first_block: Place of its first block in the prompt, a multiple of `num_blocks`.
        stored_at_s: Unix time.
        expiry_s: Unix time from which it is gone; 0 for never.
    """

    public_id: bytes
    first_block: int
    stored_at_s: int
    expiry_s: int = 0


@dataclass(frozen=True, slots=True)
class Header:
    """The first 128 bytes of an object.

    Attributes:
        shape: How it is made.
        facts: What it holds.
        last_key: (16 bytes) key of its last block, as in its name.
        salt: (16 bytes) of its sealing; zeros where it is not sealed.
        seal_id: (8 bytes) `Sealer.id` of the key; zeros where it is not sealed.
    """

    shape: GroupShape
    facts: GroupFacts
    last_key: bytes
    salt: bytes = bytes(SALT_BYTES)
    seal_id: bytes = bytes(SEAL_ID_BYTES)


@dataclass(frozen=True, slots=True)
class Footer:
    """The table at the end of an object, one row a block.

    Attributes:
        keys: (n, 16) uint8.
        offsets: (n,) uint64, of the frames in the object.
        stored_bytes: (n,) uint64, of the blocks without the heads of their frames.
        checksums: (n,) uint64, as in the heads: masked where the object is sealed.
    """

    keys: npt.NDArray[np.uint8]
    offsets: npt.NDArray[np.uint64]
    stored_bytes: npt.NDArray[np.uint64]
    checksums: npt.NDArray[np.uint64]

    def fits(self, header: Header) -> bool:
        """Return whether it is the footer of an object with this header."""
        shape = header.shape
        return (
            len(self.keys) == shape.num_blocks
            and self.keys[-1].tobytes() == header.last_key
            and bool((self.offsets == frame_offsets(shape).astype(np.uint64)).all())
            and bool((self.stored_bytes == shape.stored_bytes).all())
        )


def frame_offsets(shape: GroupShape) -> npt.NDArray[np.int64]:
    """Return (num_blocks,) int64: where each frame begins in the object."""
    return HEADER_BYTES + np.arange(shape.num_blocks, dtype=np.int64) * shape.frame_bytes


def pack_header(header: Header) -> bytes:
    """Return the first 128 bytes of an object."""
    fields = np.zeros((), _HEADER_DTYPE)
    fields["magic"] = HEADER_MAGIC
    fields["version"] = FORMAT_VERSION
    fields["flags"] = _FLAG_SEALED if header.shape.is_sealed else 0
    fields["num_blocks"] = header.shape.num_blocks
    fields["block_bytes"] = header.shape.block_bytes
    fields["first_block"] = header.facts.first_block
    fields["public_id"] = np.frombuffer(header.facts.public_id, np.uint8)
    fields["last_key"] = np.frombuffer(header.last_key, np.uint8)
    fields["stored_at_s"] = header.facts.stored_at_s
    fields["expiry_s"] = header.facts.expiry_s
    fields["salt"] = np.frombuffer(header.salt, np.uint8)
    fields["seal_id"] = np.frombuffer(header.seal_id, np.uint8)
    fields["object_bytes"] = header.shape.object_bytes
    return _with_crc(fields.tobytes())


def read_header(buffer: Body, name: str = "") -> Header:
    """Verify and return the header of an object.

    Args:
        buffer: Its first 128 bytes, or more.
        name: The object, for messages.

    Raises:
        CorruptBlock: It is cut short, damaged, or no header at all.
        IncompatibleError: Another version of the format wrote it.
    """
    data = np.frombuffer(buffer, np.uint8)[:HEADER_BYTES].tobytes()
    _check(data, HEADER_BYTES, HEADER_MAGIC, name)
    fields = np.frombuffer(data, _HEADER_DTYPE)[0]
    flags = int(fields["flags"])
    try:
        shape = GroupShape(
            int(fields["num_blocks"]), int(fields["block_bytes"]), bool(flags & _FLAG_SEALED)
        )
    except UsageError as error:
        raise _damaged(name, f"its header is senseless: {error}") from error
    facts = GroupFacts(
        fields["public_id"].tobytes(),
        int(fields["first_block"]),
        int(fields["stored_at_s"]),
        int(fields["expiry_s"]),
    )
    header = Header(
        shape,
        facts,
        fields["last_key"].tobytes(),
        fields["salt"].tobytes(),
        fields["seal_id"].tobytes(),
    )
    is_salted = any(header.salt) and any(header.seal_id)
    is_bare = not any(header.salt + header.seal_id)
    is_sound = is_salted if shape.is_sealed else is_bare
    # Whatever the fields do not say again is something this version does not write.
    if pack_header(header) != data or facts.first_block % shape.num_blocks or not is_sound:
        raise _damaged(name, "its header is senseless: fields contradict each other")
    return header


def pack_footer(
    shape: GroupShape, keys: npt.NDArray[np.uint8], checksums: npt.NDArray[np.uint64]
) -> bytes:
    """Return the footer; checksums as in the heads of the frames."""
    table = np.zeros(shape.num_blocks, _ENTRY_DTYPE)
    table["key"] = keys
    table["offset"] = frame_offsets(shape)
    table["stored_bytes"] = shape.stored_bytes
    table["checksum"] = checksums
    trailer = np.zeros((), _TRAILER_DTYPE)
    trailer["magic"] = TRAILER_MAGIC
    trailer["version"] = FORMAT_VERSION
    trailer["num_blocks"] = shape.num_blocks
    trailer["footer_bytes"] = shape.footer_bytes
    return _with_crc(table.tobytes() + trailer.tobytes())


def read_footer(buffer: Body, name: str = "") -> Footer:
    """Verify and return the footer of an object.

    Args:
        buffer: The last bytes of the object: those of the footer at least.
        name: The object, for messages.

    Raises:
        CorruptBlock: It is cut short, damaged, or no footer at all.
        IncompatibleError: Another version of the format wrote it.
    """
    view = np.frombuffer(buffer, np.uint8)
    if len(view) < TRAILER_BYTES:
        raise _damaged(name, f"{len(view)} of the {TRAILER_BYTES} bytes of its trailer are there")
    trailer = np.frombuffer(view[-TRAILER_BYTES:].tobytes(), _TRAILER_DTYPE)[0]
    footer_bytes, num_blocks = int(trailer["footer_bytes"]), int(trailer["num_blocks"])
    if trailer["magic"] != TRAILER_MAGIC or not TRAILER_BYTES <= footer_bytes <= len(view):
        raise _damaged(name, f"no footer lies within the last {len(view)} bytes")
    data = view[-footer_bytes:].tobytes()
    _check_crc(data, name)
    _check_version(int(trailer["version"]), name)
    if not 1 <= num_blocks <= NUM_BLOCKS_MAX or (
        footer_bytes != ENTRY_BYTES * num_blocks + TRAILER_BYTES
    ):
        raise _damaged(name, f"a footer of {footer_bytes} bytes for {num_blocks} blocks")
    table = np.frombuffer(data, _ENTRY_DTYPE, num_blocks)
    return Footer(
        table["key"].copy(),
        table["offset"].astype(np.uint64),
        table["stored_bytes"].astype(np.uint64),
        table["checksum"].astype(np.uint64),
    )


def crc64(data: Body) -> int:
    """Return the CRC-64/NVME of `data`."""
    return _core.crc64(np.frombuffer(data, np.uint8), _ALL_ONES) ^ _ALL_ONES


def _with_crc(data: bytes) -> bytes:
    return data[:-8] + crc64(data[:-8]).to_bytes(8, "little")


def _check(data: bytes, size_bytes: int, magic: bytes, name: str) -> None:
    if len(data) < size_bytes:
        raise _damaged(name, f"{len(data)} of the {size_bytes} bytes of its header are there")
    if data[:8] != magic:
        raise _damaged(name, f"it begins with {data[:8]!r}, not {magic!r}")
    _check_crc(data, name)
    _check_version(int.from_bytes(data[8:12], "little"), name)


def _check_crc(data: bytes, name: str) -> None:
    stored, computed = int.from_bytes(data[-8:], "little"), crc64(data[:-8])
    if stored != computed:
        raise _damaged(name, f"a checksum is {computed:#x}, it should be {stored:#x}")


def _check_version(version: int, name: str) -> None:
    if version != FORMAT_VERSION:
        raise IncompatibleError(
            f"object {name}: format version {version}, this kvx reads and writes {FORMAT_VERSION}; "
            "use the kvx that wrote it, or remove it with `kvx gc --other-versions`",
            ours=FORMAT_VERSION,
            theirs=version,
        )


def _damaged(name: str, why: str) -> CorruptBlock:
    return CorruptBlock(f"object {name} is damaged: {why}; `kvx gc` removes such objects", key=name)

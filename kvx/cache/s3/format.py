"""The bytes of an object of the S3 tier: header, one frame a block, footer.

`docs/formats/object.md` is the manual; this file packs and verifies and does no I/O. Everything is
little-endian. A frame verifies itself: any run of frames can be read by one ranged GET, without
the header. What `decode_frames` does not call OK must not be used.
"""

from __future__ import annotations

import ctypes
from typing import TYPE_CHECKING, Final

import numpy as np

from kvx.cache.disk.checksum import crc64_rows
from kvx.cache.s3.header import (
    ALIGNMENT,
    HEAD_BYTES,
    HEADER_BYTES,
    Body,
    Footer,
    GroupFacts,
    GroupShape,
    Header,
    frame_offsets,
    pack_footer,
    pack_header,
    read_footer,
    read_header,
)
from kvx.cache.s3.names import (
    FORMAT_VERSION,
    KEY_BYTES,
    SEAL_ID_BYTES,
    ObjectName,
    namespace_prefix,
    object_name,
    parse_name,
    relative_name,
)
from kvx.cache.s3.seal import SALT_BYTES, new_salt
from kvx.errors import CorruptBlock, UsageError
from kvx.transfer.codes import Code
from kvx_ext import _core

if TYPE_CHECKING:
    from collections.abc import Callable

    import numpy.typing as npt

    from kvx.cache.s3.seal import ObjectSeal, Sealer

__all__ = [
    "FORMAT_VERSION", "HEADER_BYTES", "Footer", "GroupFacts", "GroupShape", "Header", "ObjectName",
    "decode_frames", "encode", "namespace_prefix", "object_name", "parse_name", "read_footer",
    "read_header",
]  # fmt: skip

_HEAD_DTYPE: Final = np.dtype(
    [
        ("key", "u1", (KEY_BYTES,)),
        ("salt", "u1", (SALT_BYTES,)),
        ("checksum", "<u8"),
        ("expiry_s", "<u8"),
        ("place", "<u4"),
        ("stored_bytes", "<u4"),
        ("crc64", "<u8"),
    ]
)
assert _HEAD_DTYPE.itemsize == HEAD_BYTES
_COVERED_BYTES: Final = HEAD_BYTES - 8


def encode(
    shape: GroupShape,
    facts: GroupFacts,
    keys: npt.NDArray[np.uint8],
    checksums: npt.NDArray[np.uint64],
    addresses: npt.NDArray[np.int64],
    *,
    sealer: Sealer | None = None,
    target: npt.NDArray[np.uint8] | None = None,
) -> npt.NDArray[np.uint8]:
    """Return the body of an object, every block copied and verified in the same pass.

    Args:
        shape: How it is made; `is_sealed` says whether there is a sealer.
        facts: What it holds.
        keys: (num_blocks, 16) uint8, of the blocks in order.
        checksums: (num_blocks,) uint64 of the blocks under their keys.
        addresses: (num_blocks,) int64 of their bytes in host memory; nobody may write there.
        sealer: Encrypts the blocks.
        target: (object_bytes,) uint8 to write the body to; None makes one.

    Returns:
        (object_bytes,) uint8.

    Raises:
        CorruptBlock: A block does not match its checksum; it names the row. Nothing of the body may
            be stored.
        UsageError: Arrays do not fit the shape.
    """
    _check_rows(shape, keys, addresses, sealer, count=shape.num_blocks)
    if checksums.shape != (shape.num_blocks,) or facts.first_block % shape.num_blocks:
        raise UsageError(
            f"{checksums.shape} checksums from block {facts.first_block} on for objects of "
            f"{shape.num_blocks} blocks, aligned to as many"
        )
    body = _aligned(shape.object_bytes) if target is None else target
    if body.shape != (shape.object_bytes,) or body.dtype != np.uint8:
        raise UsageError(f"a body of {shape.object_bytes} bytes does not fit {body.shape}")
    last_key = keys[-1].tobytes()
    salt, seal_id, seal = bytes(SALT_BYTES), bytes(SEAL_ID_BYTES), None
    if sealer is not None:
        salt, seal_id = new_salt(), sealer.id
        name = object_name("", facts.public_id, shape.num_blocks, last_key, seal_id=seal_id)
        seal = sealer.of_object(salt, name)
    shown = checksums if seal is None else checksums ^ seal.masks(0, shape.num_blocks)
    frames = _frames(shape, body)
    frames[:, :HEAD_BYTES] = _pack_heads(shape, facts, keys, shown, salt)
    frames[:, HEAD_BYTES + shape.stored_bytes :] = 0
    if seal is None:
        offsets = frame_offsets(shape) + HEAD_BYTES
        found = _core.gather_into_body(body, offsets, addresses, keys, shape.block_bytes)
    else:
        found = _seal_blocks(shape, frames, keys, addresses, seal)
    _check_found(found, checksums, keys)
    body[:HEADER_BYTES] = np.frombuffer(
        pack_header(Header(shape, facts, last_key, salt, seal_id)), np.uint8
    )
    body[shape.footer_span[0] :] = np.frombuffer(pack_footer(shape, keys, shown), np.uint8)
    return body


def decode_frames(
    shape: GroupShape,
    buffer: Body,
    *,
    first: int,
    keys: npt.NDArray[np.uint8],
    addresses: npt.NDArray[np.int64],
    sealer: Sealer | None = None,
    name: str = "",
    now_s: int = 0,
) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.uint64]]:
    """Copy blocks out of consecutive frames to where they are wanted, and verify them.

    Args:
        shape: How the object is made.
        buffer: Bytes of the object from frame `first` on.
        first: Number of the first frame in the buffer.
        keys: (n, 16) uint8 of the blocks in frames first to first + n.
        addresses: (n,) int64 of host memory with room for a block each; 0 where it is not wanted.
        sealer: Decrypts the blocks of a sealed object.
        name: Of the object, which a sealed one is bound to.
        now_s: Unix time to judge expiry by; 0 judges none.

    Returns:
        (n,) int32 of `Code`: OK; CORRUPT: not what was asked for; SHORT: the buffer ends before;
        STALE: expired; SKIPPED: no address. And (n,) uint64 checksums of the blocks that are OK.
        The memory of a block that is not OK may have been written.

    Raises:
        UsageError: Arrays do not fit the shape.
    """
    _check_rows(shape, keys, addresses, sealer, count=len(keys))
    shape.span(first, len(keys))
    data = np.frombuffer(buffer, np.uint8)
    codes = np.full(len(keys), Code.SHORT, np.int32)
    sums = np.zeros(len(keys), np.uint64)
    # The last frame may lack its padding.
    whole = (len(data) + shape.frame_bytes - HEAD_BYTES - shape.stored_bytes) // shape.frame_bytes
    offsets = np.arange(min(len(keys), whole), dtype=np.int64) * shape.frame_bytes
    heads = data[offsets[:, None] + np.arange(HEAD_BYTES)].view(_HEAD_DTYPE)[:, 0]
    codes[: len(heads)] = _judge(shape, heads, keys=keys[: len(heads)], first=first, now_s=now_s)
    codes[addresses == 0] = Code.SKIPPED
    good = np.flatnonzero(codes == Code.OK)
    if sealer is None:
        found = _core.scatter_from_body(
            data, offsets[good] + HEAD_BYTES, addresses[good], keys[good], shape.block_bytes
        )
        is_right = found == heads["checksum"][good]
    else:
        found, is_right = _unseal_blocks(
            shape, data, heads[good], keys=keys[good], addresses=addresses[good], first=first,
            seal_of=lambda salt: sealer.of_object(salt, relative_name(name)),
        )  # fmt: skip
    codes[good[~is_right]] = Code.CORRUPT
    sums[good[is_right]] = found[is_right]
    return codes, sums


def _judge(
    shape: GroupShape,
    heads: npt.NDArray[np.void],
    *,
    keys: npt.NDArray[np.uint8],
    first: int,
    now_s: int,
) -> npt.NDArray[np.int32]:
    is_asked = (
        (heads["crc64"] == crc64_rows(_covered(heads)))
        & (heads["key"] == keys).all(axis=1)
        & (heads["place"] == first + np.arange(len(heads)))
        & (heads["stored_bytes"] == shape.stored_bytes)
        & (heads["salt"].any(axis=1) == shape.is_sealed)
    )
    codes = np.where(is_asked, np.int32(Code.OK), np.int32(Code.CORRUPT))
    is_past = (heads["expiry_s"] != 0) & (heads["expiry_s"] <= now_s)
    codes[is_asked & is_past] = Code.STALE
    return codes


def _pack_heads(
    shape: GroupShape,
    facts: GroupFacts,
    keys: npt.NDArray[np.uint8],
    checksums: npt.NDArray[np.uint64],
    salt: bytes,
) -> npt.NDArray[np.uint8]:
    fields = np.zeros(shape.num_blocks, _HEAD_DTYPE)
    fields["key"] = keys
    fields["salt"] = np.frombuffer(salt, np.uint8)
    fields["checksum"] = checksums
    fields["expiry_s"] = facts.expiry_s
    fields["place"] = np.arange(shape.num_blocks)
    fields["stored_bytes"] = shape.stored_bytes
    fields["crc64"] = crc64_rows(_covered(fields))
    return fields.view(np.uint8).reshape(-1, HEAD_BYTES)


def _seal_blocks(
    shape: GroupShape,
    frames: npt.NDArray[np.uint8],
    keys: npt.NDArray[np.uint8],
    addresses: npt.NDArray[np.int64],
    seal: ObjectSeal,
) -> npt.NDArray[np.uint64]:
    found = np.zeros(shape.num_blocks, np.uint64)
    for place, frame in enumerate(frames):
        block = _memory(int(addresses[place]), shape.block_bytes)
        found[place] = _core.block_checksums(block[None], keys[place : place + 1])[0]
        sealed = frame[HEAD_BYTES : HEAD_BYTES + shape.stored_bytes]
        seal.seal(place, frame[:_COVERED_BYTES].tobytes(), block, sealed)
    return found


def _unseal_blocks(
    shape: GroupShape,
    data: npt.NDArray[np.uint8],
    heads: npt.NDArray[np.void],
    *,
    keys: npt.NDArray[np.uint8],
    addresses: npt.NDArray[np.int64],
    first: int,
    seal_of: Callable[[bytes], ObjectSeal],
) -> tuple[npt.NDArray[np.uint64], npt.NDArray[np.bool_]]:
    """Return the checksums of blocks, and which of them are right."""
    found, is_right = np.zeros(len(heads), np.uint64), np.zeros(len(heads), np.bool_)
    seals: dict[bytes, ObjectSeal] = {}
    for row, (head, covered) in enumerate(zip(heads, _covered(heads), strict=True)):
        salt, place = head["salt"].tobytes(), int(head["place"])
        # One salt an object, unless somebody meddles.
        seal = seals.get(salt) or seals.setdefault(salt, seal_of(salt))
        block = _memory(int(addresses[row]), shape.block_bytes)
        start = (place - first) * shape.frame_bytes + HEAD_BYTES
        if seal.unseal(place, covered.tobytes(), data[start : start + shape.stored_bytes], block):
            found[row] = _core.block_checksums(block[None], keys[row : row + 1])[0]
            is_right[row] = found[row] == head["checksum"] ^ seal.masks(place, 1)[0]
    return found, is_right


def _covered(heads: npt.NDArray[np.void]) -> npt.NDArray[np.uint8]:
    """Return the bytes of heads that their checksums cover."""
    return heads.view(np.uint8).reshape(-1, HEAD_BYTES)[:, :_COVERED_BYTES]


def _check_rows(
    shape: GroupShape,
    keys: npt.NDArray[np.uint8],
    addresses: npt.NDArray[np.int64],
    sealer: Sealer | None,
    *,
    count: int,
) -> None:
    if keys.shape != (count, KEY_BYTES) or addresses.shape != (count,):
        raise UsageError(
            f"keys are {keys.shape} and addresses {addresses.shape}; ({count}, {KEY_BYTES}) and "
            f"({count},) are needed"
        )
    if shape.is_sealed != (sealer is not None):
        raise UsageError(
            "sealed objects need a sealer" if shape.is_sealed else "a sealer for objects unsealed"
        )


def _check_found(
    found: npt.NDArray[np.uint64],
    checksums: npt.NDArray[np.uint64],
    keys: npt.NDArray[np.uint8],
) -> None:
    wrong = np.flatnonzero(found != checksums)
    if len(wrong):
        row = int(wrong[0])
        raise CorruptBlock(
            f"block {row} of {len(keys)} in memory has the checksum {int(found[row]):#x}, it "
            f"should be {int(checksums[row]):#x}; the group is not stored, drop the block",
            key=keys[row].tobytes().hex(),
            offset=row,
        )


def _frames(shape: GroupShape, body: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
    start, size_bytes = shape.span(0, shape.num_blocks)
    return body[start : start + size_bytes].reshape(shape.num_blocks, shape.frame_bytes)


def _memory(address: int, size_bytes: int) -> npt.NDArray[np.uint8]:
    return np.ctypeslib.as_array((ctypes.c_ubyte * size_bytes).from_address(address))


def _aligned(size_bytes: int) -> npt.NDArray[np.uint8]:
    """Return memory whose blocks begin at a cache line, as streaming stores like it."""
    memory = np.empty(size_bytes + ALIGNMENT, np.uint8)
    skip = -memory.ctypes.data % ALIGNMENT
    return memory[skip : skip + size_bytes]

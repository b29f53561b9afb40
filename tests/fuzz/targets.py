"""What kvx decodes of bytes that anybody may send or store, as targets for a fuzzer.

A target fails when a decoder raises anything but UsageError, IncompatibleError and CorruptBlock,
accepts what it would not write itself, or lets a stranger in.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from kvx.cache.s3.format import GroupShape, decode_frames, object_name
from kvx.cache.s3.header import crc64, pack_footer, pack_header, read_footer, read_header
from kvx.cache.s3.seal import Sealer
from kvx.errors import CorruptBlock, IncompatibleError, UsageError
from kvx.transfer.agents import descriptors, messages
from kvx.transfer.agents.handshake import MAGIC, VERSION, Handshake
from kvx.transfer.agents.identity import Identity
from kvx.transfer.agents.key import SharedKey
from kvx.transfer.agents.lease_token import RemoteLease
from kvx.transfer.agents.metadata import decode_card, encode_card
from kvx.transfer.codes import Code
from kvx_ext import _core

if TYPE_CHECKING:
    from collections.abc import Callable

KEY = SharedKey(b"a key that no fuzzer guesses")
ME = Identity("me", 1, 1)
REFUSALS = (UsageError, IncompatibleError)
SEALER = Sealer(bytes(range(32)))
PUBLIC_ID = bytes(range(16))
OBJECT_KEYS = np.arange(32, dtype=np.uint8).reshape(2, 16)


def card(data: bytes) -> None:
    """A card that is accepted is written again as the same card, and never passes as signed."""
    try:
        found = decode_card(data, None)
    except REFUSALS:
        return
    assert decode_card(encode_card(found, None), None) == found
    try:
        decode_card(data, KEY)
    except REFUSALS:
        return
    raise AssertionError("an unsigned card was taken for a signed one")


def lease(data: bytes) -> None:
    """Blocks of an accepted lease lie within its region, and are written again as they are."""
    try:
        found = RemoteLease.decode(data)
    except REFUSALS:
        return
    for offset, stride, count, size in found.blocks.tolist():
        assert offset >= 0
        assert min(count, size) >= 1
        end = offset + (count - 1) * stride + size  # in Python's integers
        assert end <= found.region_bytes <= descriptors.SIZE_MAX
    again = RemoteLease.decode(found.encode())
    assert (again.blocks == found.blocks).all()
    assert again.ref == found.ref


def message(data: bytes) -> None:
    """A message that is accepted is written again as the same message."""
    try:
        found = messages.decode(data)
    except REFUSALS:
        return
    assert messages.decode(messages.encode(found)) == found


def handshake(data: bytes) -> None:
    """Messages of a stranger, to either side: none of them gets it in.

    The first byte says which side and how they are framed; the rest is cut at every 0xFFFF.
    """
    is_dialler, has_prefix = bool(data[:1] > b"\x7f"), bool(data[:1] and data[0] & 1)
    side = Handshake(ME, KEY, is_dialler=is_dialler, is_local=True, nonce=bytes(32))
    if is_dialler:
        side.begin()
    prefix = MAGIC + bytes([VERSION]) if has_prefix else b""
    for part in data[1:].split(b"\xff\xff")[:4]:
        assert side.receive(prefix + part).peer is None, "a stranger got in"


def object_part(data: bytes) -> bool:
    """Header, footer or frames of an object: what is accepted is written again as the same bytes.

    The first byte says which, and whether checksums of heads are mended, so that a fuzzer gets past
    them. A block that is called right has the checksum of the block asked for. Returns whether
    anything was accepted.
    """
    kind, part = (data[0], data[1:]) if data else (0, b"")
    is_mended = bool(kind & 4)
    try:
        match kind & 3:
            case 0:
                found = mended(part[:128]) if is_mended else part
                assert pack_header(read_header(found)) == found[:128]
            case 1:
                _footer(mended(part) if is_mended else part)
            case _:
                return _frames(part, is_sealed=bool(kind & 1), is_mended=is_mended)
    except (IncompatibleError, CorruptBlock):
        return False
    return True


def mended(data: bytes) -> bytes:
    """Return bytes whose last 8 are the checksum of the others."""
    return data[:-8] + crc64(data[:-8]).to_bytes(8, "little")


def _footer(data: bytes) -> None:
    footer = read_footer(data)
    count = len(footer.keys)
    packed = pack_footer(GroupShape(count, 4096), footer.keys, footer.checksums)
    assert len(packed) <= len(data)
    again = read_footer(packed)
    assert (again.keys == footer.keys).all()
    assert (again.checksums == footer.checksums).all()


def _frames(data: bytes, *, is_sealed: bool, is_mended: bool) -> bool:
    shape, blocks = GroupShape(2, 4096, is_sealed), np.zeros((2, 4096), np.uint8)
    if is_mended:
        size = shape.frame_bytes
        frames = (data[start : start + size] for start in range(0, len(data), size))
        data = b"".join(mended(frame[:64]) + frame[64:] for frame in frames)
    codes, checksums = decode_frames(
        shape, data, first=0, keys=OBJECT_KEYS, sealer=SEALER if is_sealed else None,
        addresses=blocks.ctypes.data + np.arange(2, dtype=np.int64) * 4096,
        name=object_name("", PUBLIC_ID, 2, OBJECT_KEYS[-1].tobytes(), seal_id=SEALER.id),
    )  # fmt: skip
    right = codes == Code.OK
    assert (checksums[right] == _core.block_checksums(blocks, OBJECT_KEYS)[right]).all()
    assert not checksums[~right].any()
    return bool(right.any())


TARGETS: dict[str, Callable[[bytes], object]] = {
    "card": card,
    "lease": lease,
    "message": message,
    "handshake": handshake,
    "object": object_part,
}

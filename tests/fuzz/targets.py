"""What agents decode of bytes that anybody may send, as targets for a fuzzer.

A target fails when a decoder raises anything but UsageError and IncompatibleError, accepts what it
would not write itself, or lets a stranger in.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvx.errors import IncompatibleError, UsageError
from kvx.transfer.agents import descriptors, messages
from kvx.transfer.agents.handshake import MAGIC, VERSION, Handshake
from kvx.transfer.agents.identity import Identity
from kvx.transfer.agents.key import SharedKey
from kvx.transfer.agents.lease_token import RemoteLease
from kvx.transfer.agents.metadata import decode_card, encode_card

if TYPE_CHECKING:
    from collections.abc import Callable

KEY = SharedKey(b"a key that no fuzzer guesses")
ME = Identity("me", 1, 1)
REFUSALS = (UsageError, IncompatibleError)


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


TARGETS: dict[str, Callable[[bytes], None]] = {
    "card": card,
    "lease": lease,
    "message": message,
    "handshake": handshake,
}

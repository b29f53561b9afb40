"""What the NIXL endpoints of two agents tell each other beside data: encoding and limits. Pure.

    Ask     -> Hello    the sender is about to transfer: what is there, and later on, what is new?
    Begin   -> Answer   a write is about to start: the owner holds its memory until the end
    Check               what the other side computed of some blocks, to be compared by their owner
    Finish  -> Answer   all bytes have moved: is the lease live still, and do they agree?
    Over                a transfer that failed touches the owner's memory no more
    Forget  -> Forgotten    a region is about to go: nothing of ours touches it any more
    Left                nothing of the sender touches anything; it will only when it is told anew

They travel over the agents' connection, in order, from peers that have proved who they are; Over
and Left over NIXL's when there is no other (see `lives`).
"""

from __future__ import annotations

from typing import Annotated

import msgspec

from kvx.errors import UsageError
from kvx.transfer.backends.fields import Lease, Number, Small, Text
from kvx.transfer.core import NOTE_BYTES_MAX

VERSION = 2
MESSAGE_BYTES_MAX = 1 << 20
# 60 bytes a block at most, so that a message stays below its limit.
CHECK_BLOCKS_MAX = 8192
FAILURES_MAX = 8192
REGIONS_MAX = 4096

_Name = Annotated[str, msgspec.Meta(max_length=128)]


class Card(msgspec.Struct, frozen=True, forbid_unknown_fields=True, array_like=True):
    """What travels in the agent's signed card.

    Attributes:
        version: Of these messages.
        nixl: Version of NIXL.
        plugins: Of NIXL, started.
    """

    version: Small
    nixl: _Name
    plugins: Annotated[list[_Name], msgspec.Meta(max_length=16)]


class Region(msgspec.Struct, frozen=True, forbid_unknown_fields=True, array_like=True):
    """A region of the sender, as NIXL addresses it."""

    number: Small
    address: Number
    size_bytes: Number
    is_device: bool
    ordinal: Small


class Ask(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag="ask"):
    """Who the sender is to NIXL; it is to be told what there is, now and whenever that changes."""

    name: _Name


class Hello(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag="hello"):
    """Who the sender is to NIXL, and all that it has registered.

    Attributes:
        number: Of the hello, larger than those of all before.
        name: What NIXL calls the sender.
        metadata: Of NIXL.
        regions: What it has registered.
    """

    number: Number
    name: _Name
    metadata: Annotated[bytes, msgspec.Meta(max_length=MESSAGE_BYTES_MAX)]
    regions: Annotated[list[Region], msgspec.Meta(max_length=REGIONS_MAX)]


class Begin(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag="begin"):
    """A write is about to start."""

    job: Number
    lease: Lease


class Check(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag="check"):
    """Checksums that the sender computed; one of `indices` and `rows` says of which blocks.

    Attributes:
        job: Number of the transfer.
        lease: What it is done under.
        is_write: Its direction.
        first: Number of the first of these blocks in the transfer.
        indices: (n,) little-endian uint32, blocks of the lease.
        rows: (n, 4) little-endian int64 within a lease of one run of bytes.
        keys: (n, 16) bytes that the checksums are computed under; empty for zeros.
        checksums: (n,) little-endian uint64.
    """

    job: Number
    lease: Lease
    is_write: bool
    first: Small
    indices: bytes
    rows: bytes
    keys: bytes
    checksums: bytes


class Finish(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag="finish"):
    """All bytes have moved; the note is delivered when everything is in order.

    Attributes:
        job: Number of the transfer.
        lease: What it is done under.
        is_write: Its direction.
        note: For the owner.
        check: The only one of a small transfer, which is not worth a message of its own.
    """

    job: Number
    lease: Lease
    is_write: bool
    note: Annotated[bytes, msgspec.Meta(max_length=NOTE_BYTES_MAX)]
    check: Check | None = None


class Answer(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag="answer"):
    """To Begin and Finish.

    Attributes:
        job: Number of the transfer.
        is_finish: Which of the two.
        code: Of `kvx.transfer.codes.Code`, of the whole.
        failures: Blocks that did not agree.
        text: Why, for people.
    """

    job: Number
    is_finish: bool
    code: Annotated[int, msgspec.Meta(ge=0, le=255)]
    failures: Annotated[list[Small], msgspec.Meta(max_length=FAILURES_MAX)]
    text: Text


class Over(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag="over"):
    """NIXL is through with a transfer that has failed."""

    job: Number


class Forget(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag="forget"):
    """A region of the sender is about to go; to be answered when nothing touches it any more."""

    region: Small


class Forgotten(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag="forgotten"):
    """Nothing of the sender touches, or will touch, that region."""

    region: Small


class Left(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag="left"):
    """Nothing of the sender touches, or will touch, what hellos up to this one have told of."""

    name: _Name
    hello: Number


Message = Ask | Hello | Begin | Check | Finish | Answer | Over | Forget | Forgotten | Left
_decoder = msgspec.msgpack.Decoder(Message)
_card_decoder = msgspec.msgpack.Decoder(Card)


def encode(message: Message | Card) -> bytes:
    """Return the bytes of a message."""
    return msgspec.msgpack.encode(message)


def decode(data: bytes) -> Message:
    """Return the message in these bytes, whoever made them.

    Raises:
        UsageError: There is none.
    """
    if len(data) > MESSAGE_BYTES_MAX:
        raise UsageError(f"a message of {len(data)} bytes: {MESSAGE_BYTES_MAX} are allowed")
    try:
        message: Message = _decoder.decode(data)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise UsageError(f"a malformed message: {error}") from None
    return message


def decode_card(data: bytes) -> Card:
    """Return the card in these bytes, whoever made them.

    Raises:
        UsageError: There is none.
    """
    try:
        card: Card = _card_decoder.decode(data)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise UsageError(f"a malformed card: {error}") from None
    return card

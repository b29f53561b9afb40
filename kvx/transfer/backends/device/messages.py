"""What two ends of a backend of device memory tell each other: encoding and limits. Pure.

    Open -> Opened      may the sender copy under this lease, and where is the memory?
    Write -> Done       copies out of memory of the sender, into leased memory of the receiver
    Cancel              the sender does not wait for Done any more, which is told all the same
    Note                what the application has to say once all has arrived
    Forget -> Forgotten a region is about to go: is it still mapped?

They travel over the agents' connection, in order, from peers that have proved who they are.
"""

from __future__ import annotations

from typing import Annotated

import msgspec
import numpy as np
import numpy.typing as npt

from kvx.errors import UsageError
from kvx.transfer.backends.fields import Lease, Number, Small, Text
from kvx.transfer.core import NOTE_BYTES_MAX

VERSION = 1
# Of one Write: 92 bytes a block at most, so that it stays below the 1 MiB of a message.
WRITE_BLOCKS_MAX = 8192
DEVICES_MAX = 64
REGIONS_MAX = 512
_ROW_BYTES = 32

_Device = Annotated[str, msgspec.Meta(max_length=64)]
_Door = Annotated[str, msgspec.Meta(max_length=64)]


class Card(msgspec.Struct, frozen=True, forbid_unknown_fields=True, array_like=True):
    """What travels in the agent's signed card.

    Attributes:
        version: Of these messages.
        devices: UUIDs of the devices that its memory lies on.
        regions: (region, place in `devices`) of its device memory; not all when they are many.
    """

    version: Small
    devices: Annotated[list[_Device], msgspec.Meta(max_length=DEVICES_MAX)]
    regions: Annotated[list[tuple[Small, Small]], msgspec.Meta(max_length=REGIONS_MAX)]


class Handle(msgspec.Struct, frozen=True, forbid_unknown_fields=True, array_like=True):
    """Where a region is found by another process.

    Attributes:
        data: As the driver made it; empty for memory that travels as a descriptor.
        token: What comes with the descriptor through the receiver's door; else empty.
        size_bytes: Of what is opened.
        offset: Where in it the region begins.
        region_bytes: Size of the region.
        device: UUID.
    """

    data: Annotated[bytes, msgspec.Meta(max_length=256)]
    token: Annotated[bytes, msgspec.Meta(max_length=16)]
    size_bytes: Number
    offset: Number
    region_bytes: Number
    device: _Device


class Open(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag="open"):
    """May the sender copy out of a region under a lease?

    Attributes:
        number: Of the question.
        lease: Of the receiver.
        region: Of the receiver.
        door: Of the sender; there as long as anything of the region may be mapped.
        wants_handle: Whether it has not mapped the region yet.
    """

    number: Number
    lease: Lease
    region: Small
    door: _Door
    wants_handle: bool


class Opened(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag="opened"):
    """To Open; `code` is one of `kvx.transfer.codes.Code`."""

    number: Number
    code: Small
    text: Text
    handle: Handle | None


class Write(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag="write"):
    """Copy blocks of mine into leased ones of yours.

    Attributes:
        number: Of the request.
        life: Incarnation of the sender.
        deadline_ms: The time it has.
        lease: Of the receiver, to be written.
        rows: (n, 4) little-endian int64, in the leased region.
        indices: (n,) little-endian uint32, the lease's blocks; empty within a lease of a range.
        source_lease: Of the sender, to be read.
        source_region: Of the sender.
        source_first: Number of the first of these blocks in the sender's lease.
        source_rows: As `rows`, in it.
        keys: (n, 16) bytes that checksums are computed under; empty for zeros.
    """

    number: Number
    life: Number
    deadline_ms: Number
    lease: Lease
    rows: bytes
    indices: bytes
    source_lease: Lease
    source_region: Small
    source_first: Small
    source_rows: bytes
    keys: bytes


class Done(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag="done"):
    """To Write: nothing of it moves any more.

    Attributes:
        number: Of the request.
        code: Of the whole where there is nothing about blocks.
        text: Why, for people.
        codes: (n,) little-endian int32 of `Code`, or empty.
        checksums: (n,) little-endian uint64 that were computed, or empty.
    """

    number: Number
    code: Small
    text: Text
    codes: bytes
    checksums: bytes


class Cancel(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag="cancel"):
    """End a Write."""

    number: Number


class Note(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag="note"):
    """A notification, once the bytes of a transfer have arrived."""

    payload: Annotated[bytes, msgspec.Meta(max_length=NOTE_BYTES_MAX)]


class Forget(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag="forget"):
    """Let go of a region of the sender."""

    region: Small


class Forgotten(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag="forgotten"):
    """A region of the receiver is mapped nowhere behind this door."""

    region: Small
    door: _Door


Message = Open | Opened | Write | Done | Cancel | Note | Forget | Forgotten
_decoder: msgspec.msgpack.Decoder[Message] = msgspec.msgpack.Decoder(Message)
_cards = msgspec.msgpack.Decoder(Card)


def encode(message: Message | Card) -> bytes:
    """Return a message as bytes."""
    return msgspec.msgpack.encode(message)


def decode(payload: bytes) -> Message:
    """Return the message in these bytes; UsageError when they are none."""
    try:
        return _decoder.decode(payload)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise UsageError(f"a message about device memory is malformed: {error}") from None


def decode_card(payload: bytes) -> Card:
    """Return the card in these bytes; UsageError when they are none."""
    try:
        return _cards.decode(payload)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise UsageError(f"a card about device memory is malformed: {error}") from None


def column(data: bytes, dtype: str, count: int, what: str) -> npt.NDArray[np.generic] | None:
    """Return (count,) numbers of a message; None for no bytes. UsageError for another length."""
    if not data:
        return None
    values = np.frombuffer(data, np.uint8)
    size = np.dtype(dtype).itemsize
    if len(values) != count * size:
        raise UsageError(f"{len(values)} bytes of {what} for {count} blocks")
    return values.view(dtype).astype(np.dtype(dtype).newbyteorder("="))


def rows_of(data: bytes) -> npt.NDArray[np.int64]:
    """Return the (n, 4) int64 rows of a message, not checked; UsageError when they are none."""
    count, rest = divmod(len(data), _ROW_BYTES)
    if rest or not 0 < count <= WRITE_BLOCKS_MAX:
        raise UsageError(f"{len(data)} bytes are no list of 1 to {WRITE_BLOCKS_MAX} blocks")
    return np.frombuffer(data, "<i8").astype(np.int64).reshape(count, 4)

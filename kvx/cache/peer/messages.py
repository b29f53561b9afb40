"""What caches tell each other: encoding, decoding and limits. Pure; see docs/formats/peers.md.

A block travels as its key, a keyed digest of namespace and hash: whoever does not know the
namespace, its salt included, learns nothing from it.
"""

from __future__ import annotations

import enum
from typing import Annotated

import msgspec
import numpy as np
import numpy.typing as npt

from kvx.errors import UsageError

TOPIC = "kvx.cache"
KEY_BYTES = 16
# Keys in one message, so that it stays below half of the agents' limit of 1 MiB.
KEYS_MAX = 1 << 14
SUSPECTS_MAX = 64
_TOKEN_BYTES_MAX = 960 << 10
_CHANGES_MAX = 4096

_Word = Annotated[int, msgspec.Meta(ge=1, le=(1 << 63) - 1)]
_Count = Annotated[int, msgspec.Meta(ge=0, le=(1 << 63) - 1)]
_Keys = Annotated[bytes, msgspec.Meta(max_length=KEYS_MAX * KEY_BYTES)]
_Tier = Annotated[int, msgspec.Meta(ge=0, le=255)]


class ChangeKind(enum.IntEnum):
    """What happened to keys in a tier."""

    STORED = 1
    REMOVED = 2
    CLEARED = 3


class Offer(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag="offer"):
    """The sender serves what it holds; `log` names its sequence of changes."""

    log: _Word


class Withdrawal(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag="withdrawal"):
    """The sender serves no more."""

    log: _Word


class Subscribe(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag="subscribe"):
    """Tell me what you hold, from `sequence` on if your log is `log`; 0 and 0 for all of it."""

    log: _Count
    sequence: _Count


class SnapshotPart(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag="part"):
    """Some of what a tier holds, coldest first; deltas go on behind `sequence`."""

    log: _Word
    sequence: _Count
    number: _Count
    is_last: bool
    tier: _Tier
    keys: _Keys


class Change(msgspec.Struct, frozen=True, forbid_unknown_fields=True, array_like=True):
    """Something happened to keys in a tier."""

    kind: Annotated[int, msgspec.Meta(ge=1, le=3)]
    tier: _Tier
    keys: _Keys


class Delta(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag="delta"):
    """Changes number `first` to `last`; a part of number `first` when `last` is one less."""

    log: _Word
    first: _Word
    last: _Count
    changes: Annotated[list[Change], msgspec.Meta(max_length=_CHANGES_MAX)]


class Ask(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag="ask"):
    """Lease me these blocks; `number` is the sender's own. Answered by `Grant`."""

    number: _Word
    block_bytes: Annotated[int, msgspec.Meta(ge=1, le=1 << 40)]
    remaining_s: Annotated[float, msgspec.Meta(gt=0, le=3600)]
    keys: Annotated[bytes, msgspec.Meta(min_length=KEY_BYTES, max_length=KEYS_MAX * KEY_BYTES)]


class Grant(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag="grant"):
    """The lease on those of the blocks asked for whose reason is 0, in order; no token without any.

    `reasons` has one `MissReason` a block; `ttls_s` is empty when none expires, else it has the
    seconds left of each leased block, little-endian uint32, 0 for ever.
    """

    number: _Word
    token: Annotated[bytes, msgspec.Meta(max_length=_TOKEN_BYTES_MAX)]
    reasons: Annotated[bytes, msgspec.Meta(max_length=KEYS_MAX)]
    ttls_s: Annotated[bytes, msgspec.Meta(max_length=KEYS_MAX * 4)]


class Release(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag="release"):
    """The lease of ask `number` is not needed any more; these keys did not match their checksum."""

    number: _Word
    blocks_done: _Count
    suspects: Annotated[bytes, msgspec.Meta(max_length=SUSPECTS_MAX * KEY_BYTES)]


Message = Offer | Withdrawal | Subscribe | SnapshotPart | Delta | Ask | Grant | Release
_decoder: msgspec.msgpack.Decoder[Message] = msgspec.msgpack.Decoder(Message)


def encode(message: Message) -> bytes:
    """Return a message as bytes."""
    return msgspec.msgpack.encode(message)


def decode(payload: bytes) -> Message:
    """Return the message in these bytes.

    Raises:
        UsageError: They are none, or over a limit.
    """
    try:
        message = _decoder.decode(payload)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise UsageError(f"a message of a cache is malformed: {error}") from None
    _check(message)
    return message


def as_keys(packed: bytes) -> npt.NDArray[np.uint8]:
    """Return (n, 16) uint8 of packed keys. REQUIRES: a decoded message had them."""
    return np.frombuffer(packed, np.uint8).reshape(-1, KEY_BYTES)


def _check(message: Message) -> None:
    """Raise UsageError for lengths that no message has."""
    match message:
        case Delta():
            packed = [change.keys for change in message.changes]
            if sum(map(len, packed)) > KEYS_MAX * KEY_BYTES or message.last < message.first - 1:
                raise UsageError("a delta has too many keys, or ends before it begins")
        case SnapshotPart() | Ask():
            packed = [message.keys]
        case Release():
            packed = [message.suspects]
        case _:
            return
    if any(len(one) % KEY_BYTES for one in packed):
        raise UsageError(f"keys have {KEY_BYTES} bytes each")

"""What connected agents tell each other beside data: encoding, decoding and limits. Pure."""

from __future__ import annotations

from typing import Annotated

import msgspec

from kvx.errors import UsageError
from kvx.transfer.agents.metadata import CARD_BYTES_MAX
from kvx.transfer.core import MESSAGE_BYTES_MAX

CARDS_MAX = 64
REGIONS_MAX = 4096
BACKEND_BYTES_MAX = 1 << 20
_TEXT_MAX = 512

_Card = Annotated[bytes, msgspec.Meta(max_length=CARD_BYTES_MAX)]
_Region = Annotated[int, msgspec.Meta(ge=0, lt=1 << 32)]
_Text = Annotated[str, msgspec.Meta(max_length=_TEXT_MAX)]


class OwnCard(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag="card"):
    """The sender's card: first of all, and whenever it has changed."""

    card: _Card


class KnownCards(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag="known"):
    """Cards of others that the sender has heard of."""

    cards: Annotated[list[_Card], msgspec.Meta(max_length=CARDS_MAX)]


class Regions(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag="regions"):
    """Regions of the sender; can the receiver copy out of them? Answered by `Reach`."""

    regions: Annotated[list[_Region], msgspec.Meta(max_length=REGIONS_MAX)]


class Reach(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag="reach"):
    """Why the sender cannot copy out of regions of the receiver; empty texts where it can."""

    objections: Annotated[dict[_Region, _Text], msgspec.Meta(max_length=REGIONS_MAX)]


class Goodbye(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag="goodbye"):
    """The sender closes the connection on purpose."""

    reason: _Text


class BackendWord(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag="backend"):
    """From the sender's endpoint of a backend to the receiver's."""

    backend: Annotated[str, msgspec.Meta(max_length=32)]
    payload: Annotated[bytes, msgspec.Meta(max_length=BACKEND_BYTES_MAX)]


Message = OwnCard | KnownCards | Regions | Reach | Goodbye | BackendWord
_decoder: msgspec.msgpack.Decoder[Message] = msgspec.msgpack.Decoder(Message)


def encode(message: Message) -> bytes:
    """Return a message as bytes."""
    return msgspec.msgpack.encode(message)


def decode(payload: bytes) -> Message:
    """Return the message in these bytes.

    Raises:
        UsageError: They are none, or over a limit.
    """
    if len(payload) > MESSAGE_BYTES_MAX:
        raise UsageError(f"a message of {len(payload)} bytes; at most {MESSAGE_BYTES_MAX}")
    try:
        return _decoder.decode(payload)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise UsageError(f"a message is malformed: {error}") from None

"""What a decode engine and a prefill engine say to each other about a reference. Pure.

decode -> prefill   claim   I am about to read the blocks of this reference
prefill -> decode   word    they are stored and held for you; or why not
decode -> prefill   done    I need them no more
"""

from __future__ import annotations

import enum
from typing import Annotated

import msgspec

import kvx
from kvx_vllm.pd.reference import ID_BYTES

TOPIC = "kvx.vllm.pd"
_GROUPS_MAX = 64
_HELD_BYTES_MAX = 512 << 10

_Id = Annotated[bytes, msgspec.Meta(min_length=ID_BYTES, max_length=ID_BYTES)]
_Number = Annotated[int, msgspec.Meta(ge=1, le=(1 << 63) - 1)]


class Verdict(enum.StrEnum):
    """What a prefill engine says of a claim. All but READY are names of an `Outcome`."""

    READY = "ready"
    UNKNOWN = "unknown"
    CONSUMED = "consumed"
    EXPIRED = "expired"
    STALE = "stale"
    OUT_OF_RANGE = "out_of_range"


class Claim(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag="claim"):
    """The sender wants so many blocks of each group; answered by `Word` once they are stored."""

    number: _Number
    id: _Id
    num_blocks: Annotated[list[int], msgspec.Meta(max_length=_GROUPS_MAX)]


class Word(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag="word"):
    """The answer to claim `number`; `held` has a bit a block and group, the first one highest."""

    number: _Number
    verdict: Verdict
    held: Annotated[
        list[Annotated[bytes, msgspec.Meta(max_length=_HELD_BYTES_MAX)]],
        msgspec.Meta(max_length=_GROUPS_MAX),
    ]


class Done(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag="done"):
    """The sender has what it needs of a reference; its blocks need not be held any more."""

    id: _Id


Message = Claim | Word | Done
_decoder: msgspec.msgpack.Decoder[Message] = msgspec.msgpack.Decoder(Message)


def encode(message: Message) -> bytes:
    """Return a message as bytes."""
    return msgspec.msgpack.encode(message)


def decode(payload: bytes) -> Message:
    """Return the message in these bytes.

    Raises:
        kvx.UsageError: They are none.
    """
    try:
        return _decoder.decode(payload)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise kvx.UsageError(f"a message about a reference is malformed: {error}") from None

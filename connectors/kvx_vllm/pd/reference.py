"""A reference to the blocks of a prompt, as it travels in `kv_transfer_params`. Pure.

Signed with the key that all agents share: whoever does not know it can neither make one nor change
one, and nobody is connected with because of one that was not verified.
"""

from __future__ import annotations

import enum
from typing import TYPE_CHECKING, Annotated, Any, Self

import msgspec

import kvx

if TYPE_CHECKING:
    from collections.abc import Mapping

ID_BYTES = 16
FIELD = "kvx_reference"
_PURPOSE = b"kvx vllm reference 1"
_NAMESPACE_BYTES = 16
_HASH_BYTES_MAX = 128
_CARD_BYTES_MAX = 8 << 10
_BLOCKS_MAX = 1 << 24
_GROUPS_MAX = 64
_NAME_MAX = 256


class Outcome(enum.StrEnum):
    """What became of a reference that a request came with; the values are those of metrics."""

    USED = "used"
    UNNEEDED = "unneeded"  # everything was here, or the request ended first
    LOAD_FAILED = "load_failed"  # some blocks did not come; they were computed
    MALFORMED = "malformed"
    FORGED = "forged"
    OTHER_PROMPT = "other_prompt"
    OTHER_NAMESPACE = "other_namespace"
    OUT_OF_RANGE = "out_of_range"  # more blocks than the prompt has, or than were stored
    UNKNOWN = "unknown"
    CONSUMED = "consumed"
    EXPIRED = "expired"
    STALE = "stale"  # the blocks were reused, or the engine was restarted
    UNREACHABLE = "unreachable"
    TIMED_OUT = "timed_out"
    UNAVAILABLE = "unavailable"  # this engine takes no references: no peers, or no key


class GroupBlocks(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The blocks of one KV cache group.

    Attributes:
        namespace: Public id of their namespace.
        num_blocks: How many blocks, from the start of the prompt.
        last_hash: The engine's hash of the last one; it covers all tokens before it. Empty with 0.
    """

    namespace: Annotated[
        bytes, msgspec.Meta(min_length=_NAMESPACE_BYTES, max_length=_NAMESPACE_BYTES)
    ]
    num_blocks: Annotated[int, msgspec.Meta(ge=0, le=_BLOCKS_MAX)]
    last_hash: Annotated[bytes, msgspec.Meta(max_length=_HASH_BYTES_MAX)]


class Reference(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Where the KV of a prompt is.

    Attributes:
        id: Random; whoever has it may have the blocks, once.
        agent: Name of the producer's agent.
        incarnation: Of this life of it, in hexadecimal digits.
        card: What is needed to connect with it.
        groups: Its blocks, by KV cache group.
        expires_at_ms: Unix time after which they may be gone.
        mac: Over all of it.
    """

    id: Annotated[bytes, msgspec.Meta(min_length=ID_BYTES, max_length=ID_BYTES)]
    agent: Annotated[str, msgspec.Meta(min_length=1, max_length=_NAME_MAX)]
    incarnation: Annotated[str, msgspec.Meta(min_length=1, max_length=16)]
    card: Annotated[bytes, msgspec.Meta(max_length=_CARD_BYTES_MAX)]
    groups: Annotated[list[GroupBlocks], msgspec.Meta(min_length=1, max_length=_GROUPS_MAX)]
    expires_at_ms: Annotated[int, msgspec.Meta(ge=0, le=1 << 52)]
    mac: Annotated[bytes, msgspec.Meta(max_length=64)] = b""

    def signed(self, key: kvx.SharedKey) -> Self:
        """Return it with the right `mac`."""
        return msgspec.structs.replace(self, mac=key.sign(_PURPOSE, self._signed_bytes()))

    def is_signed(self, key: kvx.SharedKey) -> bool:
        """Return whether whoever made it has the key, and nobody changed it since."""
        return key.verify(self.mac, _PURPOSE, self._signed_bytes())

    def to_params(self) -> dict[str, Any]:
        """Return the `kv_transfer_params` that a decode engine takes; JSON, bytes in base64."""
        return {
            "do_remote_prefill": True,
            "do_remote_decode": False,
            FIELD: msgspec.to_builtins(self),
        }

    @classmethod
    def of_params(cls, params: Mapping[str, Any]) -> Self:
        """Read the reference in `kv_transfer_params`.

        Raises:
            kvx.UsageError: There is none, or something in it is of the wrong kind or length.
        """
        try:
            return msgspec.convert(params.get(FIELD), cls)
        except (msgspec.ValidationError, UnicodeDecodeError) as error:
            raise kvx.UsageError(f"kv_transfer_params.{FIELD} is no reference: {error}") from None

    def _signed_bytes(self) -> bytes:
        return msgspec.msgpack.encode(msgspec.structs.replace(self, mac=b""))


def wants_prefill(params: Mapping[str, Any] | None) -> bool:
    """Return whether a request asks for a reference to its prompt."""
    return params is not None and params.get("do_remote_decode") is True


def has_reference(params: Mapping[str, Any] | None) -> bool:
    """Return whether a request came with a reference."""
    return params is not None and params.get("do_remote_prefill") is True

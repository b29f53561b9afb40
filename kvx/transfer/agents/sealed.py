"""The envelope of what agents hand around as bytes: cards and lease tokens.

    magic (4) | version (1) | is_signed (1) | HMAC-SHA256 (32, when signed) | body

The signature covers all but itself. An agent with a key opens only what is signed with it, one
without a key only what is not signed.
"""

from __future__ import annotations

import enum
from typing import TYPE_CHECKING

from kvx.errors import IncompatibleError, UsageError
from kvx.transfer.agents.key import MAC_BYTES

if TYPE_CHECKING:
    from kvx.transfer.agents.key import SharedKey

VERSION = 1
_PREFIX_BYTES = 6


class Kind(enum.Enum):
    """What an envelope holds, by its magic."""

    CARD = b"kvxc"
    LEASE = b"kvxl"


def seal(kind: Kind, body: bytes, key: SharedKey | None) -> bytes:
    """Return the envelope of `body`, signed when there is a key."""
    prefix = kind.value + bytes([VERSION, key is not None])
    return prefix + (b"" if key is None else key.sign(kind.value, prefix, body)) + body


def unseal(kind: Kind, data: bytes, key: SharedKey | None, *, bytes_max: int) -> bytes:
    """Return the body of an envelope.

    Raises:
        UsageError: It is no such envelope, or too large.
        IncompatibleError: It has another version, or its signature is not that of `key`.
    """
    what = kind.name.lower()
    if len(data) > bytes_max:
        raise UsageError(f"a {what} of {len(data)} bytes; at most {bytes_max} are accepted")
    if len(data) < _PREFIX_BYTES or data[:4] != kind.value or data[5] > 1:
        raise UsageError(f"these {len(data)} bytes are no {what} of kvx")
    if data[4] != VERSION:
        raise IncompatibleError(
            f"a {what} of version {data[4]}; this kvx reads version {VERSION}: run the same kvx on "
            "both sides",
            ours=VERSION,
            theirs=data[4],
        )
    is_signed = data[5] == 1
    if is_signed != (key is not None):
        raise IncompatibleError(
            f"the {what} is {'' if is_signed else 'not '}signed and this agent has "
            f"{'a' if key is not None else 'no'} key; give both sides the same key",
            ours=key is not None,
            theirs=is_signed,
        )
    if key is None:
        return data[_PREFIX_BYTES:]
    mac, body = data[_PREFIX_BYTES : _PREFIX_BYTES + MAC_BYTES], data[_PREFIX_BYTES + MAC_BYTES :]
    if not key.verify(mac, kind.value, data[:_PREFIX_BYTES], body):
        raise IncompatibleError(
            f"the signature of the {what} is wrong: it was made with another key, or altered"
        )
    return body

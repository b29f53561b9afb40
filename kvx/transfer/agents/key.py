"""The secret that all agents of a deployment share, and what is signed with it."""

from __future__ import annotations

import hashlib
import hmac
from typing import NoReturn

from kvx.errors import UsageError

KEY_BYTES_MIN = 16
MAC_BYTES = 32


class SharedKey:
    """Signs and verifies; the secret is neither shown nor copied out."""

    __slots__ = ("_secret",)

    def __init__(self, secret: bytes | str) -> None:
        """Keep a secret of at least 16 bytes; text counts in UTF-8.

        Raises:
            UsageError: It is shorter, so that it could be guessed.
        """
        raw = secret.encode() if isinstance(secret, str) else bytes(secret)
        if len(raw) < KEY_BYTES_MIN:
            raise UsageError(
                f"the key has {len(raw)} bytes, at least {KEY_BYTES_MIN} are needed; make one with "
                "secrets.token_bytes(32)"
            )
        self._secret = raw

    def sign(self, purpose: bytes, *parts: bytes) -> bytes:
        """Return the HMAC-SHA256 of the parts, for one purpose only.

        Every part goes in behind its length, so no two lists of parts sign alike.
        """
        mac = hmac.new(self._secret, digestmod=hashlib.sha256)
        for part in (purpose, *parts):
            mac.update(len(part).to_bytes(8, "little"))
            mac.update(part)
        return mac.digest()

    def verify(self, mac: bytes, purpose: bytes, *parts: bytes) -> bool:
        """Return whether `mac` is what `sign` returns; takes the same time wherever they differ."""
        return hmac.compare_digest(mac, self.sign(purpose, *parts))

    def __repr__(self) -> str:
        """Return a text without the secret."""
        return "SharedKey(***)"

    def __reduce__(self) -> NoReturn:
        """Refuse to be pickled: the secret would lie in a file."""
        raise TypeError("a SharedKey is not written anywhere")


def as_key(key: SharedKey | bytes | str | None) -> SharedKey | None:
    """Return the key that an argument stands for."""
    return key if key is None or isinstance(key, SharedKey) else SharedKey(key)

"""Sealing: AES-256-GCM of every block of an object, under a key of that object alone.

The key of an object is HKDF-SHA256 of the tenant's key, with the object's random salt and its name,
so a sealed block means nothing under another name, in another object or at another place. Its
checksum is a function of the plain bytes, so it is masked with the same key. Needs the package
`cryptography`, which is imported when the first Sealer is made. Source: docs/formats/object.md.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Final

import numpy as np

from kvx.cache.s3.names import SEAL_ID_BYTES
from kvx.errors import UnavailableError, UsageError

if TYPE_CHECKING:
    import numpy.typing as npt
    from cryptography.hazmat.primitives.ciphers.aead import AESGCM

SEAL_KEY_BYTES: Final = 32
SALT_BYTES: Final = 16
TAG_BYTES: Final = 16
_NONCE_BYTES: Final = 12
# No place has this nonce: places are 32 bits.
_MASK_NONCE: Final = b"\xff" * _NONCE_BYTES
_ID_INFO: Final = b"kvx seal id 1"
_OBJECT_INFO: Final = b"kvx seal object 1 "


class Sealer:
    """Seals and unseals objects under one tenant's key; shows its id and never the key.

    Attributes:
        id: (8 bytes) says which key an object was sealed with, without telling the key.
    """

    __slots__ = ("_key", "id")

    def __init__(self, key: bytes) -> None:
        """Keep the key.

        Args:
            key: (32 bytes) secret of the tenant, random.

        Raises:
            UsageError: It has another length.
            UnavailableError: The package `cryptography` is not here.
        """
        if len(key) != SEAL_KEY_BYTES:
            raise UsageError(f"a key for sealing has {SEAL_KEY_BYTES} bytes, not {len(key)}")
        self._key = key
        self.id = _derived(key, b"", _ID_INFO, SEAL_ID_BYTES)

    def __repr__(self) -> str:
        """Show the id alone."""
        return f"Sealer(id={self.id.hex()})"

    def __reduce__(self) -> str:
        """Refuse to be pickled."""
        raise UsageError("a Sealer holds a secret: make another one from the key where it is kept")

    def of_object(self, salt: bytes, relative_name: str) -> ObjectSeal:
        """Return what seals and unseals the blocks of one object.

        Args:
            salt: (16 bytes) of the object.
            relative_name: Its name without the prefix.
        """
        info = _OBJECT_INFO + relative_name.encode()
        return ObjectSeal(_cipher(_derived(self._key, salt, info, SEAL_KEY_BYTES)))


class ObjectSeal:
    """Seals and unseals the blocks of one object. Releases the GIL meanwhile; thread-safe."""

    __slots__ = ("_cipher",)

    def __init__(self, cipher: AESGCM) -> None:
        self._cipher = cipher

    def masks(self, first: int, count: int) -> npt.NDArray[np.uint64]:
        """Return (count,) uint64 to combine with the checksums of blocks by exclusive or."""
        stream = self._cipher.encrypt(_MASK_NONCE, bytes(8 * (first + count)), None)
        return np.frombuffer(stream, "<u8", first + count)[first:].astype(np.uint64)

    def seal(
        self, place: int, head: bytes, block: npt.NDArray[np.uint8], target: npt.NDArray[np.uint8]
    ) -> None:
        """Write the sealed block and its tag: 16 bytes more than the block."""
        self._cipher.encrypt_into(_nonce(place), block.data, head, target.data)

    def unseal(
        self, place: int, head: bytes, sealed: npt.NDArray[np.uint8], block: npt.NDArray[np.uint8]
    ) -> bool:
        """Write the plain block; False, with anything in `block`, unless it was sealed so."""
        from cryptography.exceptions import InvalidTag  # noqa: PLC0415 - a cipher is here already

        try:
            self._cipher.decrypt_into(_nonce(place), sealed.data, head, block.data)
        except InvalidTag:
            return False
        return True


def new_salt() -> bytes:
    """Return 16 random bytes, for one object."""
    return os.urandom(SALT_BYTES)


def _nonce(place: int) -> bytes:
    return place.to_bytes(_NONCE_BYTES, "little")


def _cipher(key: bytes) -> AESGCM:
    from cryptography.hazmat.primitives.ciphers.aead import AESGCM  # noqa: PLC0415 - optional

    return AESGCM(key)


def _derived(key: bytes, salt: bytes, info: bytes, size_bytes: int) -> bytes:
    try:
        from cryptography.hazmat.primitives.hashes import SHA256  # noqa: PLC0415 - optional
        from cryptography.hazmat.primitives.kdf.hkdf import HKDF  # noqa: PLC0415 - optional
    except ImportError as error:
        raise UnavailableError(
            f"sealed objects need the package cryptography ({error}): pip install kvx[s3]"
        ) from error
    return HKDF(SHA256(), size_bytes, salt, info).derive(key)

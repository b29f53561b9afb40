"""A namespace: everything two blocks must agree on, beside their hash, to be the same block.

Engines' block hashes cover tokens, not model, dtype, layout, parallel rank or tenant. kvx puts
all of that into a 16-byte fingerprint and every block's key is a digest under it, so a block of
another model can never be found, let alone served.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field, fields, replace
from typing import TYPE_CHECKING

from kvx.errors import UsageError
from kvx_ext import _core

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

BLOCK_BYTES_MIN = 4 << 10
BLOCK_BYTES_MAX = 64 << 20
_FINGERPRINT_BYTES = 16
_PERSON = b"kvx namespace 1"


@dataclass(frozen=True, slots=True)
class Namespace:
    """What makes blocks shareable; compare by value.

    Attributes:
        model: Name of the model.
        dtype: Of the KV, such as ``bfloat16``.
        block_bytes: Canonical bytes of one block, 4 KiB to 64 MiB.
        block_tokens: Tokens of one block; 0 where the engine does not tell.
        revision: Of the weights: a tag, a commit or a checksum.
        layout: Fingerprint of how a block lies in memory (`KVLayout.fingerprint`).
        tp_rank: Tensor-parallel rank.
        tp_size: Number of tensor-parallel ranks.
        pp_rank: Pipeline-parallel rank.
        pp_size: Number of pipeline-parallel ranks.
        hash_scheme: How the engine hashes blocks, with its seed.
        tenant: Whose blocks they are.
        salt: Secret that keeps tenants apart; never shown.
    """

    model: str
    dtype: str
    block_bytes: int
    block_tokens: int = 0
    revision: str = ""
    layout: str = ""
    tp_rank: int = 0
    tp_size: int = 1
    pp_rank: int = 0
    pp_size: int = 1
    hash_scheme: str = ""
    tenant: str = ""
    salt: str = field(default="", repr=False)

    def __post_init__(self) -> None:
        """Refuse what could never be right.

        Raises:
            UsageError: Names the field, its value and what is accepted.
        """
        for one in fields(self):
            value = getattr(self, one.name)
            wanted = int if one.type == "int" else str
            if type(value) is not wanted:
                shown = repr(value) if one.repr else type(value).__name__
                raise UsageError(f"namespace {one.name} must be {wanted.__name__}, not {shown}")
        if not self.model or not self.dtype:
            raise UsageError("a namespace needs a model and a dtype")
        if not BLOCK_BYTES_MIN <= self.block_bytes <= BLOCK_BYTES_MAX:
            raise UsageError(
                f"block_bytes is {self.block_bytes}; {BLOCK_BYTES_MIN} to {BLOCK_BYTES_MAX} fit"
            )
        if self.block_tokens < 0:
            raise UsageError(f"block_tokens is {self.block_tokens}; 0 where they are not known")
        for rank, size in ((self.tp_rank, self.tp_size), (self.pp_rank, self.pp_size)):
            if not 0 <= rank < size:
                raise UsageError(f"rank {rank} is not among {size} ranks")

    @property
    def fingerprint(self) -> bytes:
        """16 bytes of BLAKE2b over all fields in order, each with its length in front.

        Source: docs/formats/keys.md.
        """
        digest = hashlib.blake2b(digest_size=_FINGERPRINT_BYTES, person=_PERSON)
        for one in fields(self):
            encoded = str(getattr(self, one.name)).encode()
            digest.update(len(encoded).to_bytes(8, "little") + encoded)
        return digest.digest()

    @property
    def public_id(self) -> bytes:
        """16 bytes that name the namespace to others; see the function of that name."""
        return public_id(self.fingerprint)

    @property
    def tenant_digest(self) -> int:
        """64 bits that stand for the tenant's name in records."""
        return tenant_digest(self.tenant)

    def without_salt(self) -> Namespace:
        """Return the same namespace with an empty salt, for comparing the rest."""
        return replace(self, salt="")

    def keys(self, hashes: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
        """Return the (n, 16) uint8 keys of (n, k) uint8 block hashes, 1 <= k <= 128.

        For each row ``hashlib.blake2b(row, key=fingerprint, digest_size=16)``.
        """
        return _core.block_keys(hashes, self.fingerprint)


def tenant_digest(tenant: str) -> int:
    """Return 64 bits that stand for a tenant's name."""
    digest = hashlib.blake2b(tenant.encode(), digest_size=8, person=b"kvx tenant 1")
    return int.from_bytes(digest.digest(), "little")


def public_id(fingerprint: bytes) -> bytes:
    """Return 16 bytes that name a namespace in events and listings.

    Not the fingerprint itself: that is the secret under which keys are made, and whoever has it can
    ask whether somebody's prompt was seen.
    """
    return hashlib.blake2b(fingerprint, digest_size=16, person=b"kvx public 1").digest()

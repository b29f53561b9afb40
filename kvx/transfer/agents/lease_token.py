"""A lease as bytes that its owner hands to whoever may use it: what is leased, and until when.

Descriptors travel packed: as the numbers of equal blocks where they are such, else as raw
little-endian int64. Decoding checks every length and every sum, whoever made the token.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated

import msgspec
import numpy as np

from kvx.errors import UsageError
from kvx.transfer.agents import descriptors
from kvx.transfer.agents.identity import NAME, Count, Name, Number
from kvx.transfer.agents.key import SharedKey, as_key
from kvx.transfer.agents.sealed import Kind, seal, unseal
from kvx.transfer.core import DESCRIPTORS_MAX, LeaseRef

if TYPE_CHECKING:
    import numpy.typing as npt

TOKEN_BYTES_MAX = 64 << 20
TTL_S_MAX = 7 * 86_400.0
_ROW_BYTES, _CHECKSUM_BYTES, _KEY_BYTES, _ID_BYTES = 32, 8, 16, 4


class Rights(enum.IntFlag):
    """What a lease allows its holder.

    REMOTE_WRITE, beside WRITE: it may write the leased memory itself, through a backend whose
    writes the owner cannot stop. Then memory is free again only when the holder says so or is gone.
    """

    READ = 1
    WRITE = 2
    REMOTE_WRITE = 4


# 64 bits of the native core; msgpack has no wider numbers.
_Word = Annotated[int, msgspec.Meta(ge=1)]


class _Raw(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag="raw"):
    rows: bytes  # (n, 4) little-endian int64


class _Equal(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag="equal"):
    """Blocks of one shape at offsets base + unit * id."""

    base: Count
    unit: Count
    stride: Count
    count: Count
    row_bytes: Count
    ids: bytes  # (n,) little-endian uint32


class _Body(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    agent: Name
    incarnation: Number
    lease: _Word
    slot: Annotated[int, msgspec.Meta(ge=0, lt=1 << 32)]
    generation: _Word
    region: Annotated[int, msgspec.Meta(ge=0, lt=1 << 32)]
    region_bytes: Annotated[int, msgspec.Meta(ge=1, le=descriptors.SIZE_MAX)]
    rights: Annotated[int, msgspec.Meta(ge=1, le=7)]
    ttl_s: Annotated[float, msgspec.Meta(gt=0, le=TTL_S_MAX)]
    peer: Annotated[str, msgspec.Meta(max_length=64, pattern=f"^({NAME})?$")]
    blocks: _Raw | _Equal
    checksums: bytes
    keys: bytes


_decoder = msgspec.msgpack.Decoder(_Body)


@dataclass(frozen=True, slots=True, eq=False)
class RemoteLease:
    """Blocks of a peer's memory that this agent may read or write for a while.

    Attributes:
        agent: Name of the owner.
        incarnation: Its life; after a restart the lease is void.
        ref: What the owner knows it by.
        region: The owner's region.
        region_bytes: Its size.
        rights: What is allowed.
        ttl_s: Seconds that it was granted for; the owner counts them.
        peer: Name of the only agent that may use it; empty for any.
        blocks: (n, 4) int64 of offset, stride, count, bytes.
        checksums: (n,) uint64 that the blocks have; None when they are computed as they go.
        keys: (n, 16) uint8 that the checksums are computed under; None for zeros.
    """

    agent: str
    incarnation: int
    ref: LeaseRef
    region: int
    region_bytes: int
    rights: Rights
    ttl_s: float
    peer: str
    blocks: npt.NDArray[np.int64] = field(repr=False)
    checksums: npt.NDArray[np.uint64] | None = field(default=None, repr=False)
    keys: npt.NDArray[np.uint8] | None = field(default=None, repr=False)

    def __len__(self) -> int:
        """Return the number of blocks."""
        return len(self.blocks)

    @property
    def is_range(self) -> bool:
        """Whether it is one run of bytes, of which any part may be named."""
        return len(self.blocks) == 1 and int(self.blocks[0, descriptors.COUNT]) == 1

    @property
    def size_bytes(self) -> int:
        """Bytes of all blocks."""
        return int(descriptors.totals(self.blocks).sum())

    def encode(self, key: SharedKey | bytes | str | None = None) -> bytes:
        """Return the token, signed when there is a key."""
        body = _Body(
            self.agent,
            self.incarnation,
            *self.ref,
            self.region,
            self.region_bytes,
            int(self.rights),
            float(self.ttl_s),
            self.peer,
            _packed(self.blocks),
            b"" if self.checksums is None else self.checksums.astype("<u8").tobytes(),
            b"" if self.keys is None else self.keys.tobytes(),
        )
        return seal(Kind.LEASE, msgspec.msgpack.encode(body), as_key(key))

    @classmethod
    def decode(cls, token: bytes, key: SharedKey | bytes | str | None = None) -> RemoteLease:
        """Return the lease in a token.

        Args:
            token: As `BlockLease.token` made it.
            key: The shared key; a signed token is accepted only with the right one.

        Raises:
            UsageError: It is no token, or says something impossible.
            IncompatibleError: Another version, or not signed with `key`.
        """
        data = unseal(Kind.LEASE, bytes(token), as_key(key), bytes_max=TOKEN_BYTES_MAX)
        try:
            body = _decoder.decode(data)
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            raise UsageError(f"the lease is malformed: {error}") from None
        rows = _unpacked(body.blocks)
        if not len(rows):
            raise UsageError("the lease names no blocks")
        descriptors.check(rows, body.region_bytes)
        return cls(
            body.agent, body.incarnation, LeaseRef(body.lease, body.slot, body.generation),
            body.region, body.region_bytes, Rights(body.rights), body.ttl_s, body.peer, rows,
            _column(body.checksums, len(rows), _CHECKSUM_BYTES, "checksums", "<u8"),
            _keys(body.keys, len(rows)),
        )  # fmt: skip


def _packed(rows: npt.NDArray[np.int64]) -> _Raw | _Equal:
    """Return the shorter form of the rows."""
    shape, offsets = rows[0, 1:], rows[:, descriptors.OFFSET]
    is_equal = bool((rows[:, 1:] == shape).all())
    base = int(offsets.min())
    unit = int(np.gcd.reduce(offsets - base))
    widest = int((offsets - base).max()) // max(unit, 1)
    if not is_equal or widest >= 1 << 32:
        return _Raw(rows.astype("<i8").tobytes())
    ids = (offsets - base) // max(unit, 1)
    stride, count, row_bytes = (int(value) for value in shape)
    return _Equal(base, unit, stride, count, row_bytes, ids.astype("<u4").tobytes())


def _unpacked(packed: _Raw | _Equal) -> npt.NDArray[np.int64]:
    if isinstance(packed, _Raw):
        count = _count(packed.rows, _ROW_BYTES, "descriptors")
        return np.frombuffer(packed.rows, "<i8").astype(np.int64).reshape(count, 4)
    count = _count(packed.ids, _ID_BYTES, "descriptors")
    ids = np.frombuffer(packed.ids, "<u4").astype(np.int64)
    # In Python's integers, which do not overflow.
    last = packed.base + packed.unit * (int(ids.max()) if count else 0)
    if max(last, packed.stride, packed.count, packed.row_bytes) > descriptors.SIZE_MAX:
        raise UsageError("the lease names blocks beyond any memory")
    return descriptors.strided(
        packed.base + packed.unit * ids, packed.stride, packed.count, packed.row_bytes
    )


def _count(data: bytes, item_bytes: int, what: str) -> int:
    count, rest = divmod(len(data), item_bytes)
    if rest or count > DESCRIPTORS_MAX:
        raise UsageError(
            f"the lease has {len(data)} bytes of {what}: {item_bytes} each, and at most "
            f"{DESCRIPTORS_MAX} of them, are possible"
        )
    return count


def _column(
    data: bytes, count: int, item_bytes: int, what: str, dtype: str
) -> npt.NDArray[np.uint64] | None:
    if not data:
        return None
    if _count(data, item_bytes, what) != count:
        raise UsageError(f"the lease has {len(data) // item_bytes} {what} for {count} blocks")
    return np.frombuffer(data, dtype).astype(np.uint64)


def _keys(data: bytes, count: int) -> npt.NDArray[np.uint8] | None:
    if not data:
        return None
    if _count(data, _KEY_BYTES, "keys") != count:
        raise UsageError(f"the lease has {len(data) // _KEY_BYTES} keys for {count} blocks")
    return np.frombuffer(data, np.uint8).reshape(count, _KEY_BYTES).copy()

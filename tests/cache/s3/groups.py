"""Groups of blocks for tests of the object format, and the format once more in plain Python."""

from __future__ import annotations

import struct
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from kvx.cache.disk.checksum import crc64
from kvx.cache.s3.format import GroupFacts, GroupShape, decode_frames, encode, object_name
from kvx.cache.s3.seal import Sealer
from kvx.transfer.codes import Code
from kvx_ext import _core

NOW_S = 1_700_000_000
PUBLIC_ID = bytes(range(16))
SEALER = Sealer(bytes(range(100, 132)))


@dataclass
class Group:
    """Blocks in memory, with everything `encode` wants to know of them."""

    num_blocks: int = 4
    block_bytes: int = 4096
    sealer: Sealer | None = None
    expiry_s: int = 0
    first_block: int = 0
    seed: int = 0
    public_id: bytes = PUBLIC_ID
    blocks: npt.NDArray[np.uint8] = field(init=False)
    keys: npt.NDArray[np.uint8] = field(init=False)

    def __post_init__(self) -> None:
        rng = np.random.default_rng(self.seed)
        shape = (self.num_blocks, self.block_bytes)
        self.blocks = rng.integers(0, 256, shape, dtype=np.uint8)
        self.keys = rng.integers(0, 256, (self.num_blocks, 16), dtype=np.uint8)

    @property
    def shape(self) -> GroupShape:
        return GroupShape(self.num_blocks, self.block_bytes, self.sealer is not None)

    @property
    def facts(self) -> GroupFacts:
        return GroupFacts(self.public_id, self.first_block, NOW_S, self.expiry_s)

    @property
    def checksums(self) -> npt.NDArray[np.uint64]:
        return _core.block_checksums(self.blocks, self.keys)

    def name(self, prefix: str = "kvx") -> str:
        return object_name(
            prefix, self.public_id, self.num_blocks, self.keys[-1].tobytes(),
            seal_id=self.sealer.id if self.sealer else b"",
        )  # fmt: skip

    def encode(self) -> npt.NDArray[np.uint8]:
        return encode(
            self.shape, self.facts, self.keys, self.checksums, addresses_of(self.blocks),
            sealer=self.sealer,
        )  # fmt: skip


def addresses_of(blocks: npt.NDArray[np.uint8]) -> npt.NDArray[np.int64]:
    """Return where the rows lie."""
    return blocks.ctypes.data + np.arange(len(blocks), dtype=np.int64) * blocks.strides[0]


@dataclass
class Decoded:
    """What `decode_frames` made of bytes."""

    codes: list[Code]
    checksums: npt.NDArray[np.uint64]
    blocks: npt.NDArray[np.uint8]


def decode(
    group: Group,
    body: bytes | npt.NDArray[np.uint8],
    *,
    first: int = 0,
    count: int | None = None,
    name: str | None = None,
    now_s: int = 0,
    sealer: Sealer | None = None,
    keys: npt.NDArray[np.uint8] | None = None,
) -> Decoded:
    """Decode frames of a whole body as one ranged GET would bring them."""
    shape = group.shape
    count = group.num_blocks - first if count is None else count
    start, size_bytes = shape.span(first, count)
    blocks = np.full((count, group.block_bytes), 0xEE, np.uint8)
    codes, checksums = decode_frames(
        shape,
        bytes(body[start : start + size_bytes]),
        first=first,
        keys=(group.keys if keys is None else keys)[first : first + count],
        addresses=addresses_of(blocks),
        sealer=sealer or group.sealer,
        name=group.name() if name is None else name,
        now_s=now_s,
    )
    return Decoded([Code(code) for code in codes.tolist()], checksums, blocks)


def model_body(group: Group) -> bytes:
    """Return what an object that is not sealed holds, as docs/formats/object.md has it."""
    frames, table, offset = b"", b"", 128
    for place, (key, block) in enumerate(zip(group.keys, group.blocks, strict=True)):
        checksum = int(group.checksums[place])
        head = key.tobytes() + bytes(16)
        head += struct.pack("<QQII", checksum, group.expiry_s, place, group.block_bytes)
        frame = with_crc(head) + block.tobytes()
        frame += bytes(-len(frame) % 64)
        table += key.tobytes() + struct.pack("<QQQ", offset, group.block_bytes, checksum)
        offset += len(frame)
        frames += frame
    footer_bytes = len(table) + 32
    trailer = struct.pack("<8sIIQ", b"KVXOBEND", 1, group.num_blocks, footer_bytes)
    header = struct.pack(
        "<8sIIIIQ16s16sQQ24sQQ", b"KVXOBJCT", 1, 0, group.num_blocks, group.block_bytes,
        group.first_block, group.public_id, group.keys[-1].tobytes(), NOW_S, group.expiry_s,
        bytes(24), offset + footer_bytes, 0,
    )  # fmt: skip
    return with_crc(header) + frames + with_crc(table + trailer)


def with_crc(data: bytes) -> bytes:
    """Return bytes with their checksum behind them."""
    return data + crc64(data).to_bytes(8, "little")

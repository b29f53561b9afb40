"""The frames of docs/formats/wire.md over a plain socket, written down a second time.

By hand and from the document, so that it can also say what no agent would.
"""

from __future__ import annotations

import socket
import struct
from dataclasses import dataclass
from enum import IntEnum

import numpy as np

from kvx_ext import _core

MAGIC = 0x3178766B
HEADER = struct.Struct("<IBBHIIQ")
TO_INITIATOR = 1


class Type(IntEnum):
    """Types of frames."""

    GREETING = 1
    MESSAGE = 2
    NOTE = 3
    READ = 4
    WRITE = 5
    PULL = 6
    PIECE = 7
    DONE = 8
    CANCEL = 9
    PING = 10
    PONG = 11
    REGION = 12
    REGION_GONE = 13


@dataclass(frozen=True, slots=True)
class Frame:
    """One frame that has come."""

    type: Type
    flags: int
    id: int
    body: bytes


def frame(kind: int, body: bytes = b"", number: int = 0, flags: int = 0) -> bytes:
    """Return a frame."""
    return HEADER.pack(MAGIC, kind, flags, 0, len(body), 0, number) + body


def checksum(block: bytes) -> int:
    """Return the checksum of a block under no key."""
    array = np.frombuffer(block, np.uint8).reshape(1, -1)
    return int(_core.block_checksums(array, np.zeros((1, 16), np.uint8))[0])


def trailer(block: bytes, code: int = 0, rest: int = 0, change: int = 0) -> bytes:
    """Return the trailer of a block."""
    return struct.pack("<QII", checksum(block) ^ change, code, rest)


def piece(
    number: int, position: int, payload: bytes, trailers: list[bytes], flags: int = TO_INITIATOR,
    *, said_bytes: int | None = None, said_ends: int | None = None,
) -> bytes:  # fmt: skip
    """Return a piece; it may say other numbers than it has."""
    size = len(payload) if said_bytes is None else said_bytes
    ends = len(trailers) if said_ends is None else said_ends
    return frame(
        Type.PIECE, struct.pack("<QII", position, size, ends) + payload + b"".join(trailers),
        number, flags,
    )  # fmt: skip


def done(
    number: int, code: int = 0, failures: list[tuple[int, int]] | None = None,
    checksums: list[int] | None = None, text: bytes = b"",
) -> bytes:  # fmt: skip
    """Return the end of a request."""
    failed, sums = failures or [], checksums or []
    body = struct.pack("<IIII", code, len(text), len(failed), len(sums))
    body += b"".join(struct.pack("<IIi", block, why, 0) for block, why in failed)
    body += struct.pack(f"<{len(sums)}Q", *sums)
    return frame(Type.DONE, body + text, number)


def request(
    kind: Type, number: int, lease: tuple[int, int, int],
    rows: list[tuple[int, int, int, int]] | None = None, indices: list[int] | None = None, *,
    deadline_ms: int = 1000, note: bytes = b"", origin: bytes = b"",
) -> bytes:  # fmt: skip
    """Return a request; `lease` is (id, slot, generation)."""
    named = indices if indices is not None else rows or []
    naming = 1 if indices is not None else 2 if len({row[1:] for row in rows or []}) == 1 else 3
    bits = 1 if kind is Type.READ else 0
    body = struct.pack(
        "<QQIIIIBBB5x", lease[0], lease[2], lease[1], deadline_ms, len(named), len(note), bits,
        naming, 2 if origin else 0,
    )  # fmt: skip
    if indices is not None:
        body += struct.pack(f"<{len(indices)}I", *indices)
    elif rows and naming == 2:
        body += struct.pack("<qqq", *rows[0][1:]) + b"".join(struct.pack("<q", r[0]) for r in rows)
    else:
        body += b"".join(struct.pack("<qqqq", *row) for row in rows or [])
    return frame(kind, body + origin + note, number)


class FrameSocket:
    """A socket that frames are sent to and taken from."""

    def __init__(self, plain: socket.socket) -> None:
        """Use a connected socket."""
        self.plain = plain

    def send(self, data: bytes) -> None:
        """Send whatever bytes."""
        self.plain.sendall(data)

    def take(self) -> Frame | None:
        """Return the next frame; None when the other side has closed."""
        head = self._exactly(HEADER.size)
        if head is None:
            return None
        magic, kind, flags, _, size, _, number = HEADER.unpack(head)
        assert magic == MAGIC, "an agent sent what is no frame"
        body = self._exactly(size)
        return None if body is None else Frame(Type(kind), flags, number, body)

    def take_only(self, *kinds: Type) -> Frame | None:
        """Return the next frame of these types; others are thrown away, pings answered."""
        while (found := self.take()) is not None:
            if found.type in kinds:
                return found
            if found.type is Type.PING:
                self.send(frame(Type.PONG, number=found.id))
        return None

    def is_closed_by_peer(self, timeout_s: float = 5.0) -> bool:
        """Return whether the other side ends the connection in time; what it sends is dropped."""
        self.plain.settimeout(timeout_s)
        try:
            while self.plain.recv(1 << 16):
                pass
        except TimeoutError:
            return False
        except OSError:
            return True
        return True

    def close(self) -> None:
        """Close it."""
        self.plain.close()

    def _exactly(self, size: int) -> bytes | None:
        found = bytearray()
        while len(found) < size:
            try:
                some = self.plain.recv(size - len(found))
            except OSError:
                return None
            if not some:
                return None
            found += some
        return bytes(found)

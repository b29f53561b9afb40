"""What a villain answers when it is asked: lies about sizes, orders, sums and ends."""

from __future__ import annotations

import random
import socket
import struct
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from tests.transfer.faults import frames
from tests.transfer.faults.frames import Frame, FrameSocket, Type
from tests.transfer.faults.victim import BLOCK_BYTES

BLOCKS = 6
SIZE = BLOCKS * BLOCK_BYTES
DEADLINE_S = 0.3
CONTENT = np.random.default_rng(9).integers(0, 256, (BLOCKS, BLOCK_BYTES), np.uint8)
_BLOCKS = [bytes(block) for block in CONTENT]
_WHOLE = b"".join(_BLOCKS)
_ZEROS = bytes(BLOCK_BYTES)
SUMS = [frames.checksum(block) for block in _BLOCKS]
_TRUE = [frames.trailer(block) for block in _BLOCKS]

Answer = Callable[[FrameSocket, Frame], None]


@dataclass(frozen=True, slots=True)
class Trick:
    """Something a villain answers.

    Attributes:
        name: Of it.
        answer: Sends it.
        errors: How the transfer may end: names of errors, or ``done``.
        is_cut_off: Whether the agent has to end the connection.
        has_checksums: Whether the lease names the checksums of its blocks.
    """

    name: str
    answer: Answer
    errors: tuple[str, ...] = ("PeerLost",)
    is_cut_off: bool = True
    has_checksums: bool = False


def honest(link: FrameSocket, asked: Frame) -> None:
    """Answer a read as it should be answered, in two pieces."""
    half = BLOCKS // 2
    link.send(frames.piece(asked.id, 0, b"".join(_BLOCKS[:half]), _TRUE[:half]))
    link.send(frames.piece(asked.id, half * BLOCK_BYTES, b"".join(_BLOCKS[half:]), _TRUE[half:]))


def _twice(link: FrameSocket, asked: Frame) -> None:
    honest(link, asked)
    honest(link, asked)


def _send(make: Callable[[int], bytes]) -> Answer:
    return lambda link, asked: link.send(make(asked.id))


def _then_honest(make: Callable[[int], bytes]) -> Answer:
    def answer(link: FrameSocket, asked: Frame) -> None:
        link.send(make(asked.id))
        honest(link, asked)

    return answer


def _nothing(link: FrameSocket, asked: Frame) -> None:
    pass


def _late(link: FrameSocket, asked: Frame) -> None:
    """Half a piece in time, the rest when the read has ended."""
    data = frames.piece(asked.id, 0, _WHOLE, _TRUE)
    link.send(data[: SIZE // 2])
    time.sleep(DEADLINE_S + 0.1)
    link.send(data[SIZE // 2 :])


def _drip(link: FrameSocket, asked: Frame) -> None:
    data = frames.piece(asked.id, 0, _WHOLE, _TRUE)
    for start in range(0, 4000, 40):
        link.send(data[start : start + 40])
        time.sleep(0.01)
    link.send(data[4000:])


def _first(payload: bytes, trailers: list[bytes], **said: int) -> Answer:
    return _send(lambda number: frames.piece(number, 0, payload, trailers, **said))


def _header(magic: int, kind: int, flags: int, zero: int, size: int) -> Answer:
    return _send(lambda number: struct.pack("<IBBHIIQ", magic, kind, flags, zero, size, 0, number))


_M = frames.MAGIC
READS = (
    Trick("honest", honest, ("done",), is_cut_off=False),
    Trick("a piece past the end", _first(_WHOLE + b"x", _TRUE)),
    Trick("a piece that says more than it has", _first(_WHOLE, _TRUE, said_bytes=SIZE + 1)),
    Trick("a piece that says less than it has", _first(_WHOLE, _TRUE, said_bytes=SIZE - 1)),
    Trick("a piece of 4 GiB", _first(_WHOLE, _TRUE, said_bytes=(1 << 32) - 1)),
    Trick("a piece of nothing", _first(b"", [])),
    Trick("the second piece first", _send(
        lambda number: frames.piece(number, BLOCK_BYTES, _BLOCKS[1], _TRUE[1:2]))),
    Trick("a piece twice", _send(
        lambda number: frames.piece(number, 0, _BLOCKS[0], _TRUE[:1]) * 2)),
    Trick("a piece far outside", _send(
        lambda number: frames.piece(number, 1 << 63, _BLOCKS[0], _TRUE[:1]))),
    Trick("a trailer too many", _first(_BLOCKS[0], _TRUE[:2])),
    Trick("a trailer too few", _first(_BLOCKS[0] + _BLOCKS[1], _TRUE[:1])),
    Trick("trailers without end", _first(_BLOCKS[0], _TRUE[:1], said_ends=(1 << 32) - 1)),
    Trick("a trailer of an unknown code", _first(
        _BLOCKS[0], [frames.trailer(_BLOCKS[0], code=4711)])),
    Trick("a trailer with bytes that are zero", _first(
        _BLOCKS[0], [frames.trailer(_BLOCKS[0], rest=1)])),
    Trick("a wrong checksum", _first(
        _WHOLE, [frames.trailer(_BLOCKS[0], change=1), *_TRUE[1:]]),
        ("CorruptBlock",), is_cut_off=False),
    Trick("no checksum", _first(
        _WHOLE, [struct.pack("<QII", 0, 0, 0), *_TRUE[1:]]), ("CorruptBlock",), is_cut_off=False),
    Trick("other bytes, with their right checksum", _first(
        _ZEROS + _WHOLE[BLOCK_BYTES:], [frames.trailer(_ZEROS), *_TRUE[1:]]),
        ("CorruptBlock",), is_cut_off=False, has_checksums=True),
    Trick("blocks in another order", _first(
        b"".join(_BLOCKS[::-1]), _TRUE[::-1]), ("CorruptBlock",), is_cut_off=False,
        has_checksums=True),
    Trick("every block failed", _first(
        _WHOLE, [frames.trailer(block, code=7) for block in _BLOCKS]),
        ("StaleReference",), is_cut_off=False),
    Trick("done before anything came", _send(frames.done)),
    Trick("done with an unknown code", _send(lambda number: frames.done(number, 4711))),
    Trick("done with failures out of order", _send(
        lambda number: frames.done(number, 7, [(3, 7), (1, 7)]))),
    Trick("done with a failure of no block", _send(
        lambda number: frames.done(number, 7, [(BLOCKS, 7)]))),
    Trick("done with terminal codes in its text", _send(
        lambda number: frames.done(number, 7, text=b"\x1b[2J"))),
    Trick("refused", _send(lambda number: frames.done(number, 7)), ("StaleReference",),
          is_cut_off=False),
    Trick("done for what was not asked", _then_honest(lambda number: frames.done(number + 256)),
          ("done",), is_cut_off=False),
    Trick("a piece for what was not asked", _then_honest(
        lambda number: frames.piece(number + 256, 0, _WHOLE, _TRUE)), ("done",), is_cut_off=False),
    Trick("the piece of a write", _then_honest(
        lambda number: frames.piece(number, 0, _WHOLE, _TRUE, flags=0)), ("done",),
        is_cut_off=False),
    Trick("everything twice", _twice,
          ("done",), is_cut_off=False),
    Trick("a piece with unknown flags", _send(
        lambda number: frames.piece(number, 0, _WHOLE, _TRUE, flags=3))),
    Trick("an unknown type", _header(_M, 99, 0, 0, 0)),
    Trick("another magic", _header(0x3278766B, 10, 0, 0, 0)),
    Trick("a message of 4 GiB", _header(_M, Type.MESSAGE, 0, 0, (1 << 32) - 1)),
    Trick("a header that is not zero", _header(_M, Type.PING, 0, 1, 0)),
    Trick("another greeting", _header(_M, Type.GREETING, 0, 0, 0)),
    Trick("a region over a socket without files", _send(
        lambda _: frames.frame(Type.REGION, struct.pack("<IIqqQ", 2, 1, 4096, 0, 0), 1))),
    Trick("a message that is none", _send(
        lambda _: frames.frame(Type.MESSAGE, b"\xc1" * 64))),
    Trick("garbage", _send(lambda number: random.Random(number).randbytes(4096))),
    Trick("silence", _nothing, ("TransferTimeout",), is_cut_off=False),
    Trick("half a piece in time", _late, ("TransferTimeout",), is_cut_off=False),
    Trick("forty bytes at a time", _drip, ("TransferTimeout",), is_cut_off=False),
    Trick("the end of the connection", lambda link, _: link.plain.shutdown(socket.SHUT_RDWR)),
)  # fmt: skip

WRITES = (
    Trick("done at once, for all", _send(frames.done)),
    Trick("done at once, for a block that was not sent", _send(
        lambda number: frames.done(number, 7, [(BLOCKS - 1, 0)]))),
    Trick("done with a failure of no block", _send(
        lambda number: frames.done(number, 7, [(1 << 20, 7)]))),
    Trick("done with an unknown code", _send(lambda number: frames.done(number, 4711))),
    Trick("done with checksums of other blocks", _send(
        lambda number: frames.done(number, 7, None, [1, 2, 3]))),
    Trick("refused", _send(lambda number: frames.done(number, 7)), ("StaleReference",),
          is_cut_off=False),
    Trick("refused twice", _send(lambda number: frames.done(number, 7) * 2), ("StaleReference",),
          is_cut_off=False),
    Trick("done for what was not asked", _send(lambda number: frames.done(number + 256)),
          ("TransferTimeout",), is_cut_off=False),
    Trick("a full socket", _nothing, ("TransferTimeout",), is_cut_off=False),
    Trick("the end of the connection", lambda link, _: link.plain.shutdown(socket.SHUT_RDWR)),
)  # fmt: skip

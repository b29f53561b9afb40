"""A trusted peer that asks for what it was not given, or asks wrongly: nothing is touched."""

from __future__ import annotations

import os
import struct
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

import kvx
from kvx.transfer.agents.lease_token import RemoteLease, Rights
from tests.transfer.faults import frames
from tests.transfer.faults.frames import Type
from tests.transfer.faults.victim import CANARY, KEY
from tests.transfer.faults.villain import Villain

BLOCKS, SIZE = 16, 4096
CONFIG = {"backends": ["tcp"], "gossip": False, "unix": False}
STALE, USAGE, CAPACITY = 7, 1, 2
Lease = tuple[int, int, int]


class Owner:
    """An agent that leases the middle of its memory, and a villain that is its peer."""

    def __init__(self) -> None:
        self.agent = kvx.Agent("owner", listen="tcp://127.0.0.1:0", key=KEY, config=CONFIG)
        self.blocks = np.full((BLOCKS, SIZE), CANARY, np.uint8)
        self.registration = self.agent.register(self.blocks)
        self.villain = Villain()
        assert self.villain.dial(self.agent.addresses[0])
        self.link = self.villain.socket

    def lease(self, rights: Rights = Rights.READ, *, peer: str | None = None) -> Lease:
        """Return the lease of blocks 4 to 7."""
        held = self.registration.lease(
            self.registration.blocks([4, 5, 6, 7]), rights=rights, peer=peer
        )
        self.held = held
        return _ref(held.token)

    def close(self) -> None:
        self.villain.close()
        end = time.monotonic() + 5.0
        while self.agent.stats()["served"] and time.monotonic() < end:
            time.sleep(0.01)
        assert not self.agent.stats()["served"], "it serves a peer that is gone"
        self.registration.close(1.0)
        self.agent.close(1.0)


def _ref(token: bytes) -> Lease:
    ref = RemoteLease.decode(token, KEY).ref
    return ref.id, ref.slot, ref.generation


@pytest.fixture
def owner() -> Iterator[Owner]:
    opened = Owner()
    yield opened
    opened.close()


@dataclass(frozen=True, slots=True)
class Ask:
    """A request that must not be granted.

    Attributes:
        name: Of it.
        make: Returns it for a lease of four blocks.
        code: What it is refused with; None: the connection ends.
        rights: Of the lease.
    """

    name: str
    make: Callable[[Lease], bytes]
    code: int | None
    rights: Rights = Rights.READ | Rights.WRITE


def _read(lease: Lease, **terms: object) -> bytes:
    return frames.request(Type.READ, 256, lease, **terms)


def _rows(*rows: tuple[int, int, int, int]) -> Callable[[Lease], bytes]:
    return lambda lease: _read(lease, rows=list(rows))


def _write(lease: Lease, count: int = 4) -> bytes:
    return frames.request(Type.WRITE, 256, lease, indices=list(range(count)))


def _at(lease: Lease, slot: int) -> Lease:
    return lease[0], slot, lease[2]


_MAX = (1 << 63) - 1
_ORIGIN = struct.pack("<QIIqqqq", 1, 1, 1, 0, 1, SIZE, 0)
_PIECE = b"\x66" * SIZE
ASKS = (
    Ask("another block", lambda lease: _read(lease, indices=[4]), USAGE),
    Ask("the last block", lambda lease: _read(lease, indices=[(1 << 32) - 1]), USAGE),
    Ask("parts of named blocks", _rows((0, 0, 1, SIZE)), USAGE),
    Ask("rows before the memory", _rows((-SIZE, 0, 1, SIZE)), USAGE),
    Ask("rows beyond all memory", _rows((_MAX - 1, 0, 1, SIZE)), USAGE),
    Ask("rows whose end wraps around", _rows((_MAX, _MAX, _MAX, _MAX)), USAGE),
    Ask("rows of nothing", _rows((0, 0, 1, 0)), USAGE),
    Ask("no block", lambda lease: _read(lease, indices=[]), None),
    Ask("another generation", lambda lease: _read((*lease[:2], lease[2] + 1), indices=[0]), STALE),
    Ask("another slot", lambda lease: _read(_at(lease, lease[1] + 1), indices=[0]), STALE),
    Ask("a slot there is not", lambda lease: _read(_at(lease, (1 << 32) - 1), indices=[0]), STALE),
    Ask("another lease", lambda lease: _read((lease[0] + 1, *lease[1:]), indices=[0]), STALE),
    Ask("a write under a lease to read", _write, USAGE, Rights.READ),
    Ask("a read under a lease to write", lambda lease: _read(lease, indices=[0]), USAGE,
        Rights.WRITE),
    Ask("a pull over tcp", lambda lease: frames.request(
        Type.PULL, 256, lease, indices=[0], origin=_ORIGIN), None),
    Ask("one number twice", lambda lease: _write(lease) * 2, None),
    Ask("a piece past the end", lambda lease: _write(lease, 1) + frames.piece(
        256, 0, _PIECE * 2, [frames.trailer(_PIECE)], flags=0), None),
    Ask("the second piece first", lambda lease: _write(lease, 2) + frames.piece(
        256, SIZE, _PIECE, [frames.trailer(_PIECE)], flags=0), None),
    Ask("too many trailers", lambda lease: _write(lease, 2) + frames.piece(
        256, 0, _PIECE, [frames.trailer(_PIECE)] * 2, flags=0), None),
    Ask("a note of 1 MiB", lambda lease: _read(lease, indices=[0], note=bytes(1 << 20)), None),
    Ask("half a request", lambda _: frames.frame(Type.READ, bytes(39), 256), None),
)  # fmt: skip


@pytest.mark.parametrize("ask", ASKS, ids=lambda ask: ask.name)
def test_what_is_not_granted(owner: Owner, ask: Ask) -> None:
    before = owner.agent.stats()
    owner.link.send(ask.make(owner.lease(ask.rights)))
    if ask.code is None:
        assert owner.link.is_closed_by_peer(), "the connection lives"
    else:
        answer = owner.link.take_only(Type.DONE, Type.PIECE)
        assert answer is not None
        assert (answer.type, answer.id) == (Type.DONE, 256)
        assert struct.unpack_from("<I", answer.body)[0] == ask.code
        assert owner.agent.stats()["refused_requests"] == before["refused_requests"] + 1
    outside = np.delete(owner.blocks, [4, 5, 6, 7], axis=0)
    assert (outside == CANARY).all(), "memory that was not leased was written"
    assert owner.agent.stats()["bytes_served"] == 0


def test_a_lease_is_not_replayed(owner: Owner) -> None:
    lease = owner.lease(Rights.READ | Rights.WRITE)
    owner.link.send(_read(lease, indices=[0]))
    assert owner.link.take_only(Type.PIECE) is not None, "while it lasts it is good"
    owner.held.revoke(1.0)
    for _ in range(8):  # whoever has the place of the revoked lease now
        owner.lease(Rights.READ | Rights.WRITE)
    for request in (_read(lease, indices=[0]), _write(lease)):
        owner.link.send(request)
        answer = owner.link.take_only(Type.DONE)
        assert answer is not None
        assert struct.unpack_from("<I", answer.body)[0] == STALE
    assert (owner.blocks == CANARY).all()


def test_a_lease_of_somebody_else(owner: Owner) -> None:
    owner.link.send(_read(owner.lease(peer="somebody"), indices=[0]))
    answer = owner.link.take_only(Type.DONE)
    assert answer is not None
    assert struct.unpack_from("<I", answer.body)[0] == USAGE


def test_a_write_that_never_comes_ends(owner: Owner) -> None:
    """Its receiver drops it when its time is over, and revoking does not wait for longer."""
    lease = owner.lease(Rights.WRITE)
    owner.link.send(frames.request(Type.WRITE, 256, lease, indices=[0, 1], deadline_ms=60_000))
    owner.link.send(frames.piece(256, 0, _PIECE, [], flags=0)[:2000])
    end = time.monotonic() + 5.0
    while not owner.agent.stats()["served"] and time.monotonic() < end:
        time.sleep(0.005)
    began = time.monotonic()
    owner.held.revoke(5.0)
    assert time.monotonic() - began < 1.0, "revoking waits for a peer that does nothing"
    owner.blocks[:] = CANARY
    owner.link.send(b"\x66" * 2000)
    time.sleep(0.1)
    assert (owner.blocks == CANARY).all(), "written after it was revoked"


def test_more_than_it_may_have_under_way(owner: Owner) -> None:
    lease = owner.lease(Rights.WRITE)
    many = b"".join(
        frames.request(Type.WRITE, number << 8, lease, indices=[0], deadline_ms=60_000)
        for number in range(1, 4200)
    )
    owner.link.send(many)
    answer = owner.link.take_only(Type.DONE)
    assert answer is not None
    assert struct.unpack_from("<I", answer.body)[0] == CAPACITY


def test_answers_that_nobody_takes(owner: Owner) -> None:
    """Pings without end, of which no answer is read: the connection ends, and memory is bounded."""
    ping = frames.frame(Type.PING, number=1) * 4096
    owner.link.plain.settimeout(20.0)
    before = _rss_bytes()
    most = sent = 0
    is_cut_off = False
    try:
        while sent < 1 << 30:
            owner.link.send(ping)
            sent += len(ping)
            most = max(most, _rss_bytes() - before)
    except OSError:
        is_cut_off = True
    assert is_cut_off, "a GiB of pings was taken, and their answers are kept"
    assert most < 256 << 20, f"{most >> 20} MiB of answers were kept"


def _rss_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

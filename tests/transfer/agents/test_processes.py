"""Agents in processes of their own: death, frost, restarts, discovery, and who gets in."""

from __future__ import annotations

import contextlib
import os
import socket
import struct
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

import kvx
from kvx.transfer.agents import handshake
from kvx.transfer.agents.identity import Identity
from kvx.transfer.agents.key import SharedKey
from kvx.transfer.conformance import Rig, open_rig
from kvx.transfer.owner import OwnerProcess, pattern
from tests.sim.stalls import LATE_S
from tests.waiting import eventually

KEY = b"a key for the tests"
LOCAL = "tcp://127.0.0.1:0"
QUICK = {"ping_s": 0.05, "suspect_after_s": 0.3, "lost_after_s": 1.5, "redial_s": 0.05}
BLOCKS, BYTES = 64, 1 << 16


@contextlib.contextmanager
def rig_over(way: str, **config: object) -> Iterator[Rig]:
    terms = {"backends": [way], **QUICK, **config}
    listen = LOCAL if way == "tcp" else None
    with open_rig(
        way, is_process=True, config=terms, listen=listen, num_blocks=BLOCKS, block_bytes=BYTES
    ) as rig:
        yield rig


def all_blocks(rig: Rig, **terms: object) -> kvx.RemoteBlocks:
    return rig.peer.blocks(lease=rig.ask("lease", list(range(BLOCKS)), **terms)[1])


def here(rig: Rig) -> kvx.Descriptors:
    return rig.registration.blocks(range(BLOCKS), BYTES)


@pytest.mark.parametrize("way", ["shm", "tcp"])
def test_a_killed_peer_is_lost_at_once(way: str) -> None:
    with rig_over(way) as rig:
        remote = all_blocks(rig)
        rig.agent.read(here(rig), remote).wait()
        assert rig.process is not None
        rig.process.kill()
        assert eventually(lambda: rig.peer.state is kvx.PeerState.LOST, 2.0)
        down = [e for e in rig.agent.events(1.0) if isinstance(e, kvx.PeerDown)]
        assert [event.name for event in down] == ["owner"]
        with pytest.raises(kvx.PeerLost, match="owner is lost"):
            rig.agent.read(here(rig), remote)


def test_reads_under_way_end_when_their_peer_is_killed() -> None:
    with rig_over("tcp") as rig:
        remote = all_blocks(rig)
        assert rig.process is not None
        transfers = [rig.agent.read(here(rig), remote, deadline_s=5.0) for _ in range(30)]
        rig.process.kill()
        began = time.monotonic()
        ends = []
        for transfer in transfers:
            try:
                ends.append(transfer.wait().blocks_done)
            except kvx.PeerLost as error:
                ends.append(error.bytes_done // BYTES if error.peer == "owner" else -1)
        assert time.monotonic() - began < 2.0
        assert len(ends) == 30
        assert min(ends) >= 0


@pytest.mark.parametrize("way", ["shm", "tcp"])
def test_a_frozen_peer_is_seen_waited_for_and_dropped(way: str) -> None:
    with rig_over(way) as rig:
        remote = all_blocks(rig, rights=int(kvx.Rights.WRITE))
        rig.write_one()
        assert rig.process is not None
        rig.process.freeze()
        try:
            assert eventually(lambda: rig.peer.state is kvx.PeerState.FROZEN, 2.0)
            began = time.monotonic()
            transfer = rig.agent.write(here(rig), remote, deadline_s=0.3)
            with pytest.raises(kvx.TransferTimeout, match="owner is frozen"):
                transfer.wait()
            assert time.monotonic() - began < 0.4 + LATE_S
            assert transfer.outcome is kvx.LinkOutcome.QUARANTINED
            (held,) = rig.agent.quarantine
            assert (held.peer, held.is_write, held.size_bytes) == ("owner", True, BLOCKS * BYTES)
            assert eventually(lambda: rig.peer.state is kvx.PeerState.LOST, 4.0)
            assert "nothing was heard of it" in rig.peer.reason
            assert transfer.wait_quiesced(2.0)
            assert rig.agent.quarantine == []
        finally:
            rig.process.thaw()
        assert eventually(lambda: rig.peer.state is kvx.PeerState.UP)


@pytest.mark.parametrize("way", ["shm", "tcp"])
def test_a_peer_that_was_frozen_for_a_moment_is_up_again(way: str) -> None:
    with rig_over(way, lost_after_s=20.0) as rig:
        assert rig.process is not None
        rig.process.freeze()
        assert eventually(lambda: rig.peer.state is kvx.PeerState.FROZEN, 3.0)
        rig.process.thaw()
        assert eventually(lambda: rig.peer.state is kvx.PeerState.UP, 3.0)
        rig.agent.read(here(rig), all_blocks(rig)).wait()
        assert (rig.blocks == pattern(1, BLOCKS, BYTES)).all()


def test_a_cancelled_write_says_the_truth() -> None:
    with rig_over("tcp", lost_after_s=20.0) as rig:
        remote = all_blocks(rig, rights=int(kvx.Rights.WRITE))
        done = rig.agent.write(here(rig), remote)
        done.wait()
        assert not done.cancel()
        assert done.outcome is kvx.LinkOutcome.DONE
        assert rig.process is not None
        rig.process.freeze()
        transfer = rig.agent.write(here(rig), remote, deadline_s=5.0)
        assert transfer.cancel()
        with pytest.raises(kvx.TransferCancelled):
            transfer.wait()
        assert transfer.outcome is kvx.LinkOutcome.QUARANTINED
        rig.process.thaw()
        assert transfer.wait_quiesced(5.0)
        assert str(transfer.outcome) == "cancelled"
        read = rig.agent.read(here(rig), all_blocks(rig), deadline_s=5.0)
        if read.cancel():
            with contextlib.suppress(kvx.TransferCancelled):
                read.wait()
        assert read.wait_quiesced(5.0)
        assert read.outcome in (kvx.LinkOutcome.CANCELLED, kvx.LinkOutcome.DONE)


def test_a_restarted_peer_is_joined_again_and_its_old_leases_are_void(tmp_path: Path) -> None:
    config = {**QUICK, "directory": str(tmp_path)}
    with kvx.Agent("one", key=KEY, config=config) as one:
        first = OwnerProcess("owner", key=KEY, config=config)
        peer = one.connect("owner")
        token = first.ask("lease", [0])[1]
        buffer = one.register(np.zeros(BYTES, np.uint8))
        remote = peer.blocks(lease=token)
        first.kill()
        with OwnerProcess("owner", key=KEY, config=config) as later:
            assert eventually(lambda: one.peers["owner"].state is kvx.PeerState.UP)
            assert eventually(lambda: peer.state is kvx.PeerState.FENCED)
            assert one.peers["owner"] != peer
            with pytest.raises(kvx.StaleReference, match="was restarted"):
                one.read(buffer.blocks([0], 4096), remote)
            with pytest.raises(kvx.StaleReference, match="restarted since the lease"):
                one.peers["owner"].blocks(lease=token)
            fresh = one.peers["owner"].blocks(lease=later.ask("lease", [0])[1])
            one.read(buffer.blocks([0], 4096), fresh).wait()
        first.close()


def test_three_processes_know_each_other_by_gossip() -> None:
    with (
        OwnerProcess("hub", key=KEY, listen=LOCAL) as hub,
        OwnerProcess("spoke-0", key=KEY, listen=LOCAL) as one,
        OwnerProcess("spoke-1", key=KEY, listen=LOCAL) as other,
    ):
        address = hub.ask("addresses")[0]
        for spoke in (one, other):
            assert spoke.ask("connect", address) == "hub"
        assert eventually(lambda: one.ask("known") == ["hub", "spoke-1"])
        assert one.ask("connect", "spoke-1") == "spoke-1"
        assert other.ask("peers") == {"hub": "up", "spoke-0": "up"}


def test_a_shared_directory_brings_them_together(tmp_path: Path) -> None:
    config = {"directory": str(tmp_path), "mesh": True}
    with (
        OwnerProcess("a", key=KEY, config=config) as one,
        OwnerProcess("b", key=KEY, config=config) as other,
    ):
        assert eventually(lambda: one.ask("peers") == {"b": "up"})
        assert eventually(lambda: other.ask("peers") == {"a": "up"})
        other.kill()
        assert eventually(lambda: one.ask("peers") == {"b": "lost"})
    with OwnerProcess("c", key=KEY, config=config) as third:
        # The card that the killed one left behind is recognised and removed.
        assert eventually(lambda: sorted(os.listdir(tmp_path)) == ["c.card"])  # noqa: PTH208
        assert third.ask("known") == []


def framed(payload: bytes) -> bytes:
    return struct.pack("<I", 0x3178766B) + payload


class Stranger:
    """A raw connection to an agent."""

    def __init__(self, address: str) -> None:
        host, port = address.removeprefix("tcp://").rsplit(":", 1)
        self.socket = socket.create_connection((host, int(port)), timeout=5)

    def is_closed(self) -> bool:
        """Wait until the agent closes the connection; False after a while."""
        end = time.monotonic() + 5
        try:
            while time.monotonic() < end:
                if not self.socket.recv(65_536):
                    return True
        except ConnectionResetError:
            return True
        except TimeoutError:
            return False
        return False

    def close(self) -> None:
        self.socket.close()


@pytest.fixture
def guarded() -> Iterator[kvx.Agent]:
    config = {**QUICK, "greeting_s": 0.5, "unix": False, "lost_after_s": 20.0}
    with kvx.Agent("guarded", key=KEY, listen=LOCAL, config=config) as agent:
        yield agent


GARBAGE = [
    b"GET / HTTP/1.1\r\nHost: x\r\n\r\n",
    bytes(4096),
    os.urandom(65_536),
    framed(b"\xff" * 64),
    framed(b"\x01" * 20 + b"\xff" * 4),
    b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
]


@pytest.mark.parametrize("garbage", GARBAGE, ids=range(len(GARBAGE)))
def test_garbage_is_cut_off_and_serves_nobody(guarded: kvx.Agent, garbage: bytes) -> None:
    stranger = Stranger(guarded.addresses[0])
    with contextlib.suppress(ConnectionError):
        stranger.socket.sendall(garbage)
    assert stranger.is_closed()
    stranger.close()
    assert guarded.peers == {}
    with kvx.Agent("friend", key=KEY) as friend:
        assert friend.connect(guarded.addresses[0]).state is kvx.PeerState.UP


def test_silence_is_cut_off_after_the_greeting_time(guarded: kvx.Agent) -> None:
    strangers = [Stranger(guarded.addresses[0]) for _ in range(8)]
    assert all(stranger.is_closed() for stranger in strangers)
    for stranger in strangers:
        stranger.close()
    assert eventually(lambda: guarded.stats()["connections"] == 0)


def test_a_recorded_handshake_does_not_open_the_door(guarded: kvx.Agent) -> None:
    """A man in the middle hands every byte on, and afterwards says again what the dialler said."""
    recorded = bytearray()
    host, port = guarded.addresses[0].removeprefix("tcp://").rsplit(":", 1)
    with socket.create_server(("127.0.0.1", 0)) as middle:
        listen = f"tcp://127.0.0.1:{middle.getsockname()[1]}"
        with kvx.Agent("friend", key=KEY, config={"connections": 1, "unix": False}) as friend:
            wish = friend._parts.dialler.wish
            with friend._parts.roster.changed:
                wish(listen)
                friend._parts.core.wake()
            near, _ = middle.accept()
            with near, socket.create_connection((host, int(port))) as far:
                near.settimeout(0.2)
                far.settimeout(0.2)
                end = time.monotonic() + 5
                while time.monotonic() < end and "friend" not in guarded.peers:
                    for source, target, is_kept in ((near, far, True), (far, near, False)):
                        with contextlib.suppress(TimeoutError):
                            data = source.recv(65_536)
                            target.sendall(data)
                            recorded += data if is_kept else b""
        assert "friend" in guarded.peers
    assert eventually(lambda: guarded.peers["friend"].state is kvx.PeerState.LOST)
    stranger = Stranger(guarded.addresses[0])
    stranger.socket.sendall(bytes(recorded))
    assert stranger.is_closed()
    stranger.close()
    assert guarded.peers["friend"].state is kvx.PeerState.LOST


def test_who_has_no_key_gets_no_further_than_the_proof(guarded: kvx.Agent) -> None:
    for key, has_key in ((None, False), (SharedKey(b"x" * 16), True)):
        stranger = Stranger(guarded.addresses[0])
        me = handshake.Handshake(Identity("s", 5, 5), key, is_dialler=True, is_local=True)
        stranger.socket.sendall(wire_greeting(me.begin()))
        answers = [read_greeting(stranger.socket)]
        step = me.receive(answers[0])
        if has_key:
            stranger.socket.sendall(wire_greeting(step.reply or b""))
            answers.append(read_greeting(stranger.socket))
            step = me.receive(answers[-1])
        assert step.refusal is not None
        assert step.refusal.why is handshake.Why.KEY
        assert step.refusal.is_theirs
        assert KEY not in b"".join(answers)
        assert stranger.is_closed()
        stranger.close()
    assert guarded.peers == {}


def wire_greeting(payload: bytes) -> bytes:
    """Frame a greeting: magic, type, flags, two bytes unused, size, number; see docs/formats."""
    return struct.pack("<IBBHIxxxxQ", 0x3178766B, 1, 0, 0, len(payload), 0) + payload


def read_greeting(source: socket.socket) -> bytes:
    header = source.recv(24, socket.MSG_WAITALL)
    size = struct.unpack_from("<I", header, 8)[0]
    return source.recv(size, socket.MSG_WAITALL)

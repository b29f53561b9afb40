"""Who does not know the key gets nowhere, whatever it sends or repeats."""

from __future__ import annotations

import random
import socket
import time
from collections.abc import Iterator

import pytest

import kvx
from kvx.errors import IncompatibleError, StaleReference, TransferTimeout
from tests.sim.stalls import LATE_S
from tests.transfer.faults import frames
from tests.transfer.faults.frames import FrameSocket, Type
from tests.transfer.faults.victim import KEY, WAYS, start_victim
from tests.transfer.faults.villain import Villain

CONFIG = {"backends": ["tcp"], "gossip": False, "greeting_s": 0.5, "ping_s": 0.05}
GARBAGE_SEED = 20


@pytest.fixture
def door() -> Iterator[kvx.Agent]:
    with kvx.Agent("door", listen="tcp://127.0.0.1:0", key=KEY, config=CONFIG) as agent:
        yield agent
        assert not any(peer.state.is_connected for peer in agent.peers.values()), "somebody got in"


def _knock(agent: kvx.Agent) -> FrameSocket:
    address = next(one for one in agent.addresses if one.startswith("tcp://"))
    host, _, port = address.removeprefix("tcp://").rpartition(":")
    plain = socket.create_connection((host, int(port)))
    plain.settimeout(5.0)
    return FrameSocket(plain)


def _noise(kind: str) -> bytes:
    rng = random.Random(GARBAGE_SEED)
    return {
        "nothing at all": b"",
        "random bytes": rng.randbytes(4096),
        "a greeting of random bytes": frames.frame(Type.GREETING, rng.randbytes(300)),
        "a greeting of 16 KiB": frames.frame(Type.GREETING, bytes(16 << 10)),
        "a greeting of 4 GiB": frames.frame(Type.GREETING)[:8] + b"\xff" * 4 + bytes(12),
        "a request": frames.request(Type.READ, 256, (1, 1, 1), indices=[0]),
        "http": b"GET / HTTP/1.1\r\nHost: door\r\n\r\n",
    }[kind]


@pytest.mark.parametrize(
    "kind",
    [
        "nothing at all", "random bytes", "a greeting of random bytes", "a greeting of 16 KiB",
        "a greeting of 4 GiB", "a request", "http",
    ],
)  # fmt: skip
def test_noise(door: kvx.Agent, kind: str) -> None:
    link = _knock(door)
    began = time.monotonic()
    link.send(_noise(kind))
    assert link.is_closed_by_peer(), "whoever says nothing right may stay"
    assert time.monotonic() - began < 0.5 + 2 * LATE_S + 0.3
    link.close()


def test_a_wrong_key(door: kvx.Agent) -> None:
    stranger = Villain("stranger", key=b"quite another secret")
    assert not stranger.dial(door.addresses[0]), "it was let in"
    stranger.close()
    began = time.monotonic()
    with kvx.Agent("lost", key=b"quite another secret", config=CONFIG) as agent:
        with pytest.raises(IncompatibleError, match="key"):
            agent.connect(door.addresses[0], 5.0)
        assert time.monotonic() - began < 2.0, "it was tried again and again"


def test_a_handshake_that_was_recorded(door: kvx.Agent) -> None:
    """The accepter's nonce is another one: what was right once is not right again."""
    recorder = Villain("recorder")
    assert recorder.dial(door.addresses[0])
    recorder.close()
    end = time.monotonic() + 5.0
    while door.peers["recorder"].state.is_connected and time.monotonic() < end:
        time.sleep(0.01)
    hello, proof = recorder.greetings
    link = _knock(door)
    link.send(frames.frame(Type.GREETING, hello))
    assert link.take_only(Type.GREETING) is not None
    link.send(frames.frame(Type.GREETING, proof))
    refusal = link.take_only(Type.GREETING)
    assert refusal is not None
    assert b"key" in refusal.body
    assert link.is_closed_by_peer()
    link.close()


def test_an_accepter_that_never_answers(door: kvx.Agent) -> None:
    """A half-open door: the connection stands, and nobody greets."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        address = f"tcp://127.0.0.1:{silent.getsockname()[1]}"
        began = time.monotonic()
        with pytest.raises(TransferTimeout):
            door.connect(address, 0.3)
        assert time.monotonic() - began < 0.3 + LATE_S + 0.1


def test_a_token_of_a_former_life() -> None:
    """After a restart neither a token nor a peer of the former life is of any use."""
    way = WAYS[3]
    with kvx.Agent("initiator", key=KEY, config=way.config) as agent:
        victim = start_victim(way)
        former = agent.connect(victim.ask("card"))
        token = victim.ask("token")
        victim.kill()
        victim.close()
        victim = start_victim(way)
        present = agent.connect(victim.ask("card"))
        assert present.incarnation != former.incarnation
        for peer in (former, present):
            with pytest.raises(StaleReference):
                peer.descriptors([0], [64], lease=token)
        victim.kill()
        victim.close()

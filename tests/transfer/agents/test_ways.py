"""Backends of others: how they are found, offered memory, asked, chosen, and what goes wrong."""

from __future__ import annotations

import time
from collections.abc import Iterator
from importlib.metadata import EntryPoint

import numpy as np
import pytest

import kvx
from kvx.buffers import Buffer, MemoryKind
from kvx.transfer.agents import ways
from kvx.transfer.backend import BackendHost, LinkRequest, Memory, PeerCard
from kvx.transfer.backends.native import NativeChannel, NativeEndpoint
from kvx.transfer.core import LinkJob, Way
from tests.transfer.agents.pairs import BLOCKS, BYTES, KEY

LOG: list[str] = []


class EchoChannel:
    """Streams over the core, and writes down what it was asked."""

    def __init__(self, host: BackendHost, peer: PeerCard) -> None:
        self._inner = NativeChannel(host, Way.STREAM, peer.number)
        self._peer = peer

    def submit(self, request: LinkRequest) -> LinkJob:
        LOG.append(f"submit to {self._peer.name}, card {self._peer.card!r}")
        return self._inner.submit(request)

    def is_up(self) -> bool:
        return True

    def close(self, timeout_s: float) -> None:
        LOG.append(f"close {self._peer.name} {timeout_s}")


class EchoEndpoint(NativeEndpoint):
    def __init__(self, host: BackendHost) -> None:
        super().__init__(host, Way.STREAM, lambda _: "")
        self._mine = host
        host.on_message(lambda peer, payload: LOG.append(f"{host.agent} heard {peer} {payload!r}"))

    def register(self, memory: Memory) -> None:
        LOG.append(f"register {memory.kind} {memory.size_bytes}")

    def card(self) -> bytes:
        return f"echo of {self._mine.agent}".encode()

    def connect(self, peer: PeerCard, timeout_s: float) -> EchoChannel:  # type: ignore[override]
        self._mine.send(peer.name, b"hello")
        LOG.append(f"connect {timeout_s}")
        return EchoChannel(self._mine, peer)


class Echo:
    name, rank = "echo", 1
    kinds = frozenset({MemoryKind.HOST, MemoryKind.DEVICE})

    def availability(self) -> str:
        return ""

    def open(self, host: BackendHost) -> EchoEndpoint:
        return EchoEndpoint(host)


class Absent(Echo):
    name = "absent"

    def availability(self) -> str:
        return "libabsent.so is not installed; pip install absent"


class Broken(Echo):
    name = "broken"

    def open(self, host: BackendHost) -> EchoEndpoint:
        raise RuntimeError(f"no luck for {host.agent}")


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    LOG.clear()
    entries = [
        EntryPoint(name, f"{__name__}:{what}", ways.ENTRY_POINTS)
        for name, what in [
            ("echo", "Echo"), ("absent", "Absent"), ("broken", "Broken"), ("gone", "Nothing"),
        ]
    ]  # fmt: skip
    monkeypatch.setattr(ways, "entry_points", lambda group: entries if group else [])
    yield
    assert LOG


def test_a_backend_of_somebody_else_is_chosen_by_its_rank(installed: None) -> None:
    assert installed is None
    blocks = np.random.default_rng(1).integers(0, 256, (BLOCKS, BYTES), dtype=np.uint8)
    target = np.zeros_like(blocks)
    with kvx.Agent("one", key=KEY) as one, kvx.Agent("other", key=KEY) as other:
        source, registration = other.register(blocks), one.register(target)
        peer = one.connect(other.export())
        lines = str(one.explain(peer)).splitlines()
        assert lines[:4] == [
            "to other:",
            "  echo: chosen",
            "  local: possible; echo is preferred",
            "  tcp: possible; echo is preferred",
        ]
        # What the others say depends on the machine.
        ours = [line for line in lines[4:] if not line.startswith(("  cuda-", "  nixl"))]
        said = dict(line.strip().split(": not here because ", 1) for line in ours)
        assert said == {
            "absent": "libabsent.so is not installed; pip install absent",
            "broken": "it cannot be opened: RuntimeError: no luck for one",
            "gone": f"it cannot be loaded: AttributeError: module '{__name__}' has no attribute "
            "'Nothing'",
            "shm": "other is in this process: that is local",
        }
        remote = peer.blocks(lease=source.lease(source.blocks(range(BLOCKS))).token)
        result = one.read(registration.blocks(range(BLOCKS)), remote).wait()
        assert result.backend == "echo"
        assert (target == blocks).all()
        assert "submit to other, card b'echo of other'" in LOG
        end = time.monotonic() + 5
        while "other heard one b'hello'" not in LOG and time.monotonic() < end:
            time.sleep(0.01)
        assert "other heard one b'hello'" in LOG
        device = one.register(Buffer(4096, (64,), (1,), 1, True, MemoryKind.DEVICE, 0, None))
        assert len(device.lease()) == 1
        other.close()
        while "close other 0.0" not in LOG and time.monotonic() < end:
            time.sleep(0.01)
    assert f"register host {BLOCKS * BYTES}" in LOG
    assert "register device 64" in LOG
    assert "close other 0.0" in LOG


def test_the_configuration_limits_the_choice(installed: None) -> None:
    assert installed is None
    config = {"backends": ["tcp"]}
    with kvx.Agent("one", key=KEY, config=config) as one, kvx.Agent("other", key=KEY) as other:
        peer = one.connect(other.export())
        chosen = one.explain(peer).chosen
        assert chosen is not None
        assert chosen.backend == "tcp"
        assert "echo: not here because the configuration allows tcp only" in str(one.explain(peer))
        source = other.register(np.zeros(64, np.uint8))
        here = one.register(np.zeros(64, np.uint8))
        remote = peer.descriptors([0], [64], lease=source.lease().token)
        with pytest.raises(kvx.UnavailableError, match="configuration allows tcp only"):
            one.read(here.descriptors([0], [64]), remote, backend="echo")
    with pytest.raises(
        kvx.UsageError, match=r"backends = warp: unknown; here are local, .*shm, .*tcp"
    ):
        kvx.Agent("x", config={"backends": ["warp"]})

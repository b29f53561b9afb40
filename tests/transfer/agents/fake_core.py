"""Cores in memory, for tests of what the agents decide: no sockets, no threads, no time of its own.

A `FakeNetwork` delivers what cores send to each other at once, as events; tests turn the loops of
their agents by hand and set the clock and what connections are said to look like.
"""

from __future__ import annotations

import random
from collections import deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from kvx.errors import PeerLost, UnavailableError
from kvx.transfer.agents.config import AgentConfig
from kvx.transfer.agents.identity import Identity
from kvx.transfer.agents.key import as_key
from kvx.transfer.agents.parts import AgentParts, assemble
from kvx.transfer.core import Event, EventKind

if TYPE_CHECKING:
    from collections.abc import Sequence

START = 1_000.0


@dataclass(eq=False)
class FakeConnection:
    """One end of a connection."""

    core: FakeCore
    number: int
    address: str
    is_unix: bool
    other: FakeConnection | None = None
    peer: int = 0
    is_dropped: bool = False
    health: dict[str, object] = field(default_factory=dict)


class FakeNetwork:
    """Where fake cores listen and meet; also their maker, and their clock."""

    def __init__(self, seed: int = 1) -> None:
        """Start empty at a fixed time."""
        self.now = START
        self.rng = random.Random(seed)
        self.listeners: dict[str, FakeCore] = {}
        self.cores: list[FakeCore] = []
        self.agents: list[AgentParts] = []
        self.dials: list[tuple[str, str]] = []

    def clock(self) -> float:
        return self.now

    def wall_ns(self) -> int:
        return int(self.now * 1e9)

    def agent(self, **_options: object) -> FakeCore:
        core = FakeCore(self)
        self.cores.append(core)
        return core

    def pair(self, one: FakeCore, other: FakeCore) -> tuple[int, int]:
        ours, theirs = self.connect(one, other, "this process", is_unix=True)
        return ours.number, theirs.number

    def plan(self, *_arguments: object, **_named: object) -> object:
        raise AssertionError("the fake moves no bytes")

    def tls(self, *_files: str) -> object:
        return object()

    def open(
        self, name: str, *, key: str | None = None, listen: str | None = None,
        incarnation: int | None = None, started_ns: int | None = None, **config: object,
    ) -> AgentParts:  # fmt: skip
        """Return the parts of an agent, whose loop the test turns."""
        identity = Identity(
            name,
            self.rng.getrandbits(62) + 1 if incarnation is None else incarnation,
            self.wall_ns() if started_ns is None else started_ns,
        )
        parts = assemble(
            identity, AgentConfig.load({"unix": False, **config}), self, listen=listen,
            key=as_key(key), tls=None, backends=(), clock=self.clock, wall_ns=self.wall_ns,
            rng=self.rng,
        )  # fmt: skip
        self.agents.append(parts)
        return parts

    def connect(
        self, one: FakeCore, other: FakeCore, address: str, *, is_unix: bool
    ) -> tuple[FakeConnection, FakeConnection]:
        ours = one.add(address, is_unix=is_unix)
        theirs = other.add("127.0.0.1:5555" if not is_unix else address, is_unix=is_unix)
        ours.other, theirs.other = theirs, ours
        for end in (ours, theirs):
            end.core.tell(EventKind.OPENED, end)
        return ours, theirs

    def settle(self) -> None:
        """Turn all loops until nothing happens any more."""
        for _ in range(200):
            agents = [agent for agent in self.agents if agent.is_open]
            was_busy = any(agent.core.events for agent in agents)
            for agent in agents:
                agent.loop.turn(0.0)
            if not was_busy and not any(agent.core.events for agent in agents):
                return
        raise AssertionError("the agents never come to rest")

    def advance(self, seconds: float) -> None:
        """Let time pass in small steps, with everything that is due."""
        end = self.now + seconds
        while self.now < end:
            self.now = min(end, self.now + 0.05)
            self.settle()

    def die(self, agent: AgentParts) -> None:
        """End a process without a word: its connections are closed by its kernel."""
        self.agents.remove(agent)
        self.listeners = {
            address: core for address, core in self.listeners.items() if id(core) != id(agent.core)
        }
        for connection in list(agent.core.connections.values()):
            agent.core.end(connection, "gone")


class FakeCore:
    """See `LinkCore`."""

    def __init__(self, network: FakeNetwork) -> None:
        """Belong to a network."""
        self.network = network
        self.connections: dict[int, FakeConnection] = {}
        self.events: deque[Event] = deque()
        self.is_closed = False
        self.refused: list[str] = []
        self.cut: list[str] = []  # after they were approved
        self.pulls: dict[int, str] = {}
        self._next = 1

    def add(self, address: str, *, is_unix: bool) -> FakeConnection:
        connection = FakeConnection(self, self._next, address, is_unix)
        self.connections[self._next] = connection
        self._next += 1
        return connection

    def tell(self, kind: EventKind, connection: FakeConnection, payload: bytes = b"") -> None:
        self.events.append((int(kind), connection.number, connection.peer, 0, payload))

    def end(self, connection: FakeConnection, reason: str) -> None:
        for end in (connection, connection.other):
            if end is not None and not end.is_dropped:
                end.is_dropped = True
                end.core.connections.pop(end.number, None)
                why = reason if end is connection else "the peer closed the connection"
                end.core.tell(EventKind.CLOSED, end, why.encode())

    def listen_tcp(self, host: str, port: int, tls: object) -> int:  # noqa: ARG002
        port = port or 10_000 + len(self.network.listeners)
        self.network.listeners[f"{host}:{port}"] = self
        return port

    def listen_unix(self, path: str) -> None:
        self.network.listeners[path] = self

    def dial_tcp(self, host: str, port: int, tls: object, timeout_s: float) -> int:  # noqa: ARG002
        address = f"{host}:{port}"
        self.network.dials.append((address, f"{self.network.now - START:.2f}"))
        other = self.network.listeners.get(address)
        if other is None:
            connection = self.add(address, is_unix=False)
            self.end(connection, "connection refused")
            return connection.number
        return self.network.connect(self, other, address, is_unix=False)[0].number

    def dial_unix(self, path: str, timeout_s: float) -> int:  # noqa: ARG002
        other = self.network.listeners.get(path)
        if other is None:
            raise UnavailableError(f"{path}: nobody listens there")
        return self.network.connect(self, other, path, is_unix=True)[0].number

    def _send(self, number: int, kind: EventKind, payload: bytes) -> None:
        connection = self.connections.get(number)
        if connection is None or connection.other is None:
            raise PeerLost("the connection is gone")
        connection.other.core.tell(kind, connection.other, payload)

    def send_greeting(self, connection: int, payload: bytes) -> None:
        assert self.connections[connection].peer == 0, "greeted after it was approved"
        self._send(connection, EventKind.GREETING, payload)

    def send_message(self, connection: int, payload: bytes) -> None:
        self._send(connection, EventKind.MESSAGE, payload)

    def send_note(self, connection: int, payload: bytes) -> None:
        self._send(connection, EventKind.NOTE, payload)

    def approve(self, connection: int, peer: int) -> None:
        if connection not in self.connections:
            raise PeerLost("the connection is gone")
        self.connections[connection].peer = peer

    def drop(self, connection: int, reason: str) -> None:
        found = self.connections.get(connection)
        if found is None:
            raise PeerLost("no such connection")
        self.refused.append(reason)
        if found.peer:
            self.cut.append(reason)
        self.end(found, reason)

    def info(self, connection: int) -> dict[str, object]:
        found = self.connections.get(connection)
        if found is None:
            raise PeerLost("no such connection")
        return {
            "peer": found.peer, "is_unix": found.is_unix, "address": found.address,
            "heard_ago_s": 0.0, "answered_ago_s": 0.0, "unacknowledged": 0, "retransmits": 0,
            **found.health,
        }  # fmt: skip

    def can_pull(self, peer: int, region: int, timeout_s: float = 0.0) -> str:  # noqa: ARG002
        return self.pulls.get(region, "")

    def next_events(self, max: int, timeout_s: float) -> Sequence[Event]:  # noqa: A002, ARG002
        return [self.events.popleft() for _ in range(min(max, len(self.events)))]

    def wake(self) -> None:
        return

    def stats(self) -> dict[str, int]:
        return {"running": 0}

    def quarantine(self) -> list[tuple[int, int, bool, int, float]]:
        return []

    def close(self, timeout_s: float) -> tuple[int, int, int]:  # noqa: ARG002
        self.is_closed = True
        for connection in list(self.connections.values()):
            self.end(connection, "the agent was closed")
        return 0, 0, 0

"""The peers an agent knows: their lives, numbers, cards and connections.

The native core knows peers by number. Each life of a name has a number of its own, so what was
granted to a former life is nothing to the next one. A number may be given out before its peer has
ever been seen: then the first life that comes takes it.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from kvx.transfer.agents.peer_state import PeerState

if TYPE_CHECKING:
    from kvx.transfer.agents.identity import Identity
    from kvx.transfer.agents.metadata import AgentCard
    from kvx.transfer.backend import Channel


@dataclass(slots=True, eq=False)
class Lane:
    """An approved connection.

    Attributes:
        connection: Its number in the native core.
        number: Which of the peer's connections; 0 carries messages.
        is_dialled: Whether this agent dialled it.
        is_unix: Whether it never leaves this machine: a socket file, or within the process.
        address: Of the other side.
        began: When it was approved.
        is_introduced: Whether the peer's card came over it, or it needs none.
    """

    connection: int
    number: int
    is_dialled: bool
    is_unix: bool
    address: str
    began: float
    is_introduced: bool = False


@dataclass(slots=True, eq=False)
class PeerRecord:
    """One life of a peer, guarded by the roster's lock.

    Attributes:
        identity: Who it is.
        number: What the native core calls it.
        card: Its card; None before it has come.
        lanes: Its connections by number.
        state: Where it stands.
        since: When that began.
        reason: Why it is down.
        objections: Why it cannot copy out of our regions, by region, as it said; empty texts where
            it can.
        channels: The ways to it that are open, by backend.
    """

    identity: Identity
    number: int
    card: AgentCard | None = None
    lanes: dict[int, Lane] = field(default_factory=dict)
    state: PeerState = PeerState.CONNECTING
    since: float = 0.0
    reason: str = ""
    objections: dict[int, str] = field(default_factory=dict)
    channels: dict[str, Channel] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """Name of the peer."""
        return self.identity.name

    @property
    def is_introduced(self) -> bool:
        """Whether its card has come over a connection that stands."""
        return any(lane.is_introduced for lane in self.lanes.values())

    def messenger(self) -> Lane | None:
        """Return the connection that messages go over; None without any."""
        return min(self.lanes.values(), key=lambda lane: (lane.number, lane.began), default=None)


class Roster:
    """All peers of one agent. `changed` guards it, and is notified of every change."""

    def __init__(self) -> None:
        """Start empty."""
        self.changed = threading.Condition(threading.RLock())
        self._current: dict[str, PeerRecord] = {}
        self._by_number: dict[int, PeerRecord] = {}
        self._reserved: dict[str, int] = {}
        self._next_number = 1

    def __len__(self) -> int:
        """Return the number of names."""
        return len(self._current)

    def current(self, name: str) -> PeerRecord | None:
        """Return the present life of a name; None when it was never met."""
        return self._current.get(name)

    def by_number(self, number: int) -> PeerRecord | None:
        """Return the life that the native core calls so."""
        return self._by_number.get(number)

    def all(self) -> list[PeerRecord]:
        """Return the present life of every name."""
        with self.changed:
            return list(self._current.values())

    def number_of(self, name: str) -> int:
        """Return the number of a name's present life, or of its first one to come."""
        with self.changed:
            record = self._current.get(name)
            if record is not None:
                return record.number
            if name not in self._reserved:
                self._reserved[name] = self._take_number()
            return self._reserved[name]

    def welcome(self, identity: Identity) -> tuple[PeerRecord, PeerRecord | None]:
        """Return the record of a life, and the former life when this one takes its place."""
        with self.changed:
            record = self._current.get(identity.name)
            if record is not None and record.identity.incarnation == identity.incarnation:
                return record, None
            number = self._reserved.pop(identity.name, 0) or self._take_number()
            fresh = PeerRecord(identity, number)
            self._current[identity.name] = fresh
            self._by_number[number] = fresh
            return fresh, record

    def forget(self, record: PeerRecord) -> None:
        """Drop a life that nobody can come back to: its native number stays taken for ever."""
        with self.changed:
            if self._current.get(record.name) is record:
                del self._current[record.name]
            self._by_number.pop(record.number, None)

    def _take_number(self) -> int:
        self._next_number += 1
        return self._next_number - 1

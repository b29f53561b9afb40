"""Which peers an agent is connected with, and how they are doing.

Fed with the events of the native core by the agent's thread, and with time by `tick`; decides who
is approved, who is up, who is fenced off, and tells of every change. What peers say to each other
beside data is in `conversation.py`.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from kvx.errors import KvxError, PeerLost
from kvx.transfer.agents.handshake import Refusal, Why
from kvx.transfer.agents.messages import OwnCard, encode
from kvx.transfer.agents.peer_state import (
    Health,
    PeerChanged,
    PeerDown,
    PeerEvent,
    PeerRestarted,
    PeerState,
    PeerUp,
    is_overdue,
    judge,
)
from kvx.transfer.agents.roster import Lane, PeerRecord

if TYPE_CHECKING:
    from collections.abc import Callable

    from kvx.transfer.agents.config import AgentConfig
    from kvx.transfer.agents.dialler import Dialler, Wish
    from kvx.transfer.agents.issuer import Issuer
    from kvx.transfer.agents.reception import Arrival, Reception
    from kvx.transfer.agents.roster import Roster
    from kvx.transfer.core import LinkCore

_log = logging.getLogger(__name__)


class Membership:
    """The connections of one agent. Guarded by the roster's lock; acts on the agent's thread.

    Attributes:
        events: What has happened and was not told yet, oldest first.
        when_up: Called with a peer that has come up.
        when_down: Called with a peer whose last connection is gone, or that was fenced off.
    """

    def __init__(
        self,
        core: LinkCore,
        config: AgentConfig,
        *,
        roster: Roster,
        dialler: Dialler,
        reception: Reception,
        issuer: Issuer,
        clock: Callable[[], float],
    ) -> None:
        """Begin alone."""
        self._core = core
        self._config = config
        self._roster = roster
        self._dialler = dialler
        self._reception = reception
        self._issuer = issuer
        self._clock = clock
        self._owners: dict[int, PeerRecord] = {}
        self._lanes_due: dict[int, float] = {}
        self.events: list[PeerEvent] = []
        self.when_up: Callable[[PeerRecord], None] = lambda _: None
        self.when_down: Callable[[PeerRecord], None] = lambda _: None

    def lane(self, connection: int) -> tuple[PeerRecord, Lane] | None:
        """Return the peer and the approved connection of this number; None when it is gone."""
        record = self._owners.get(connection)
        return None if record is None else (record, record.lanes[connection])

    def opened(self, connection: int) -> None:
        """Greet a connection that stands."""
        try:
            self._reception.opened(connection)
        except KvxError as error:
            _log.debug("connection %s was gone before it was greeted: %s", connection, error)

    def greeting(self, connection: int, payload: bytes) -> None:
        """Take a greeting, and the connection when it is proven."""
        try:
            arrival = self._reception.greeting(connection, payload)
            if arrival is not None:
                self._admit(arrival)
        except KvxError as error:
            _log.debug("connection %s was gone while it was greeted: %s", connection, error)

    def closed(self, connection: int, reason: str) -> None:
        """Forget a connection that is gone."""
        was_greeting = self._reception.closed(connection)
        self._dialler.failed(connection, reason)
        record = self._owners.pop(connection, None)
        if record is None:
            if was_greeting:
                self._roster.changed.notify_all()
            return
        del record.lanes[connection]
        if record.lanes:
            return
        record.objections.clear()
        if record.state is PeerState.FENCED:
            self._roster.forget(record)
            return
        self._enter(record, PeerState.LOST, record.reason or reason)
        self._dialler.lost(record.name)

    def introduced(self, record: PeerRecord, lane: Lane) -> None:
        """Note that a peer's card has come; its first connection makes it UP."""
        lane.is_introduced = True
        if not record.state.is_connected:
            self._assess(record)

    def drop(self, connection: int, reason: str) -> None:
        """End a connection; its CLOSED event does the rest."""
        try:
            self._core.drop(connection, reason)
        except KvxError as error:
            _log.debug("connection %s was gone already: %s", connection, error)

    def part(self, record: PeerRecord, reason: str) -> None:
        """End all connections to a peer, and stop wanting it."""
        self._dialler.unwish(record.name)
        record.reason = reason
        for connection in list(record.lanes):
            self.drop(connection, reason)

    def is_connected(self, wish: Wish) -> bool:
        """Return whether somebody wished for is there."""
        record = None if wish.name is None else self._roster.current(wish.name)
        return record is not None and bool(record.lanes)

    def tick(self) -> None:
        """Look at every connection, and dial what is due."""
        for record in self._roster.all():
            if record.lanes:
                self._look_at(record)
                self._fill_lanes(record)
        self._dialler.dial(self.is_connected)

    def _admit(self, arrival: Arrival) -> None:
        record, former = self._roster.welcome(arrival.identity)
        if former is not None:
            self._fence(former, arrival.identity.incarnation)
        if arrival.is_dialled and arrival.lane == 0 and record.lanes:
            rest = list(record.lanes)
            if record.is_introduced:
                self._reception.refuse(
                    arrival.connection, Refusal(Why.DUPLICATE, "connected already")
                )
                return
            for connection in rest:
                self.drop(connection, "a dial that crossed another one")
        if not arrival.is_dialled and arrival.lane == 0:
            self._drop_outlived(record)
        self._approve(record, arrival)

    def _approve(self, record: PeerRecord, arrival: Arrival) -> None:
        info = self._core.info(arrival.connection)
        if arrival.farewell is not None:
            self._core.send_greeting(arrival.connection, arrival.farewell)
        self._core.approve(arrival.connection, record.number)
        self._reception.admitted(arrival.connection)
        attempt = self._dialler.succeeded(arrival.connection, record.name)
        lane = Lane(
            arrival.connection,
            arrival.lane,
            is_dialled=arrival.is_dialled,
            is_unix=bool(info["is_unix"]),
            address=str(info["address"]) if attempt is None else attempt.address,
            began=self._clock(),
            is_introduced=arrival.lane > 0,
        )
        record.lanes[arrival.connection] = lane
        self._owners[arrival.connection] = record
        if record.state is PeerState.LOST:
            self._enter(record, PeerState.CONNECTING, "")
        if arrival.is_dialled and arrival.lane == 0:
            # Its answer is the other's card; the accepter says nothing before.
            self._core.send_message(arrival.connection, encode(OwnCard(self._issuer.data)))

    def _drop_outlived(self, record: PeerRecord) -> None:
        """Drop connections that the peer must have lost, since it dials anew."""
        now = self._clock()
        for connection, lane in list(record.lanes.items()):
            if now - lane.began >= self._config.greeting_s:
                self.drop(connection, "the peer has dialled anew")

    def _fence(self, former: PeerRecord, incarnation: int) -> None:
        """Cut off a former life: what it granted and was granted is void from now on."""
        self.events.append(PeerRestarted(former.name, incarnation, former.identity.incarnation))
        self._enter(former, PeerState.FENCED, "a later life of this agent has taken its place")
        for connection in list(former.lanes):
            self.drop(connection, "a later life of this agent has taken its place")
        if not former.lanes:
            self._roster.forget(former)

    def _look_at(self, record: PeerRecord) -> None:
        healths = []
        for connection, lane in list(record.lanes.items()):
            try:
                health = Health.of(self._core.info(connection))
            except PeerLost:
                continue  # its CLOSED event is on its way
            is_late = not lane.is_introduced and (
                self._clock() - lane.began > 2 * self._config.greeting_s
            )
            if is_overdue(health, self._config) or is_late:
                self.drop(connection, f"nothing was heard of it for {health.silent_s:.1f} s")
            else:
                healths.append(health)
        state = judge(healths, self._config, is_introduced=record.is_introduced)
        if healths and state is not PeerState.LOST:
            self._enter(record, state, "")

    def _assess(self, record: PeerRecord) -> None:
        self._enter(record, PeerState.UP, "")
        self._fill_lanes(record)

    def _fill_lanes(self, record: PeerRecord) -> None:
        """Dial the further connections of a peer that was reached over TCP."""
        ours = [one for one in record.lanes.values() if one.is_dialled and not one.is_unix]
        if record.state is not PeerState.UP or not ours:
            return
        if self._lanes_due.get(record.number, 0.0) > self._clock():
            return
        self._lanes_due[record.number] = self._clock() + self._config.redial_max_s
        there = {lane.number for lane in record.lanes.values()}
        wish = next((one for one in self._dialler.wishes if one.name == record.name), None)
        if wish is None:
            return
        for number in range(1, self._config.connections):
            if number not in there:
                self._dialler.dial_lane(wish, ours[0].address, number)

    def _enter(self, record: PeerRecord, state: PeerState, reason: str) -> None:
        """Let a peer be in a state from now on, and tell of it when that is news."""
        before = record.state
        if before is state or before is PeerState.FENCED:
            return
        record.state, record.since, record.reason = state, self._clock(), reason
        incarnation = record.identity.incarnation
        self.events.append(PeerChanged(record.name, incarnation, before, state))
        if state is PeerState.UP and not before.is_connected:
            self.events.append(PeerUp(record.name, incarnation))
            self.when_up(record)
        elif not state.is_connected:
            self._lanes_due.pop(record.number, None)
            if before.is_connected:
                self.events.append(PeerDown(record.name, incarnation, reason))
            self.when_down(record)
        self._roster.changed.notify_all()

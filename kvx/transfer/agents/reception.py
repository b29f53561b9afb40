"""Connections that have not proven themselves yet, and which of two crossing dials is kept.

When two agents dial each other at once, the connection dialled by the one with the smaller (name,
incarnation) stays. Only that one decides, so both never give up at once: it refuses the other's
dial while its own is under way, or lets go of its own when the other's is up already.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING

from kvx.errors import KvxError
from kvx.transfer.agents.address import is_loopback_peer
from kvx.transfer.agents.handshake import Handshake, Introduction, Refusal, Step, Why
from kvx.transfer.agents.peer_state import PeerState

if TYPE_CHECKING:
    from kvx.transfer.agents.config import AgentConfig
    from kvx.transfer.agents.dialler import Dialler
    from kvx.transfer.agents.identity import Identity
    from kvx.transfer.agents.key import SharedKey
    from kvx.transfer.agents.roster import PeerRecord, Roster
    from kvx.transfer.core import LinkCore

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Arrival:
    """A connection whose other side has proven who it is, not approved yet.

    Attributes:
        connection: Its number.
        identity: Who it is.
        lane: Which of the peer's connections it is to be.
        is_dialled: Whether this agent dialled it.
        farewell: The last greeting, to be sent when it is approved; None for none.
    """

    connection: int
    identity: Identity
    lane: int
    is_dialled: bool
    farewell: bytes | None


class Reception:
    """The greetings under way. Guarded by the roster's lock; acts on the agent's thread."""

    def __init__(
        self,
        core: LinkCore,
        me: Identity,
        key: SharedKey | None,
        config: AgentConfig,
        *,
        roster: Roster,
        dialler: Dialler,
    ) -> None:
        """Begin with nobody at the door."""
        self._core = core
        self._me = me
        self._key = key
        self._config = config
        self._roster = roster
        self._dialler = dialler
        self._greetings: dict[int, Handshake] = {}

    def opened(self, connection: int) -> None:
        """Begin to greet a connection that stands."""
        attempt = self._dialler.attempt(connection)
        handshake = Handshake(
            self._me,
            self._key,
            is_dialler=attempt is not None,
            is_local=self._is_local(connection),
            lane=0 if attempt is None else attempt.lane,
            expected=None if attempt is None else attempt.wish.name,
            judge=self._judge,
        )
        self._greetings[connection] = handshake
        if attempt is not None:
            self._core.send_greeting(connection, handshake.begin())

    def greeting(self, connection: int, payload: bytes) -> Arrival | None:
        """Take a greeting; returns the connection once it has proven itself."""
        handshake = self._greetings.get(connection)
        if handshake is None:
            self._core.drop(connection, "a greeting that nobody waited for")
            return None
        step = handshake.receive(payload)
        if step.refusal is not None:
            self._end(connection, handshake, step)
            return None
        if step.peer is None:
            assert step.reply is not None, "an unfinished handshake has something to say"
            self._core.send_greeting(connection, step.reply)
            return None
        is_dialled = self._dialler.attempt(connection) is not None
        return Arrival(connection, step.peer, handshake.lane, is_dialled, step.reply)

    def admitted(self, connection: int) -> None:
        """Forget a greeting that has led to an approved connection."""
        self._greetings.pop(connection, None)

    def refuse(self, connection: int, refusal: Refusal) -> None:
        """End a greeting for a reason found after its proof."""
        handshake = self._greetings[connection]
        self._end(connection, handshake, handshake.refuse(refusal))

    def closed(self, connection: int) -> bool:
        """Forget a connection that is gone; returns whether it was being greeted."""
        return self._greetings.pop(connection, None) is not None

    def _end(self, connection: int, handshake: Handshake, step: Step) -> None:
        refusal = step.refusal
        assert refusal is not None, "it ends with a refusal"
        self._greetings.pop(connection, None)
        attempt = self._dialler.attempt(connection)
        if attempt is not None and handshake.claimed is not None and attempt.wish.name is None:
            attempt.wish.name = handshake.claimed.name
        is_noise = refusal.why in (Why.DUPLICATE, Why.SELF)
        _log.log(
            logging.DEBUG if is_noise else logging.WARNING,
            "%s: a connection is refused (%s): %s",
            self._me.name,
            refusal.why,
            refusal.text,
        )
        self._dialler.failed(connection, refusal.text, refusal)
        try:
            if step.reply is not None:
                self._core.send_greeting(connection, step.reply)
            self._core.drop(connection, refusal.text)
        except KvxError as error:
            _log.debug("a refused connection was gone already: %s", error)

    def _is_local(self, connection: int) -> bool:
        """Return whether a connection never leaves this machine, by the address it really has."""
        info = self._core.info(connection)
        return bool(info["is_unix"]) or is_loopback_peer(str(info["address"]))

    def _judge(self, claim: Introduction) -> Refusal | None:
        """Return what speaks against a connection, by a claim that is not proven yet."""
        record = self._roster.current(claim.identity.name)
        if record is None and len(self._roster) >= self._config.peers_max:
            return Refusal(Why.CAPACITY, f"{self._me.name} knows as many agents as it may")
        if record is not None and record.identity.incarnation != claim.identity.incarnation:
            return self._judge_other_life(record, claim.identity)
        if claim.lane > 0:
            is_due = record is not None and record.is_introduced
            return None if is_due else Refusal(Why.PROTOCOL, "a second connection comes first")
        if claim.is_dialler:
            return self._judge_their_dial(record, claim.identity)
        return self._judge_our_dial(record, claim.identity)

    @staticmethod
    def _judge_other_life(record: PeerRecord, identity: Identity) -> Refusal | None:
        """Refuse a former life while the present one is there."""
        if record.state is PeerState.UP and not identity.is_newer(record.identity):
            return Refusal(
                Why.FENCED,
                f"a later {identity.name} has taken its place; give each agent a name of its own",
            )
        return None

    def _judge_their_dial(self, record: PeerRecord | None, identity: Identity) -> Refusal | None:
        """Refuse a dial that crosses ours. What is up already they have lost, or will let be."""
        if self._me.rank > identity.rank:
            return None
        is_ours_young = record is not None and any(
            lane.is_dialled and not lane.is_introduced for lane in record.lanes.values()
        )
        if is_ours_young or self._dialler.is_dialling(identity.name):
            return Refusal(Why.DUPLICATE, "this agent has dialled, too")
        return None

    def _judge_our_dial(self, record: PeerRecord | None, identity: Identity) -> Refusal | None:
        """Give our dial up when the peer is there already, or theirs goes before ours."""
        is_theirs_coming = self._me.rank > identity.rank and any(
            greeting.claimed == identity and self._dialler.attempt(connection) is None
            for connection, greeting in self._greetings.items()
        )
        if is_theirs_coming or (record is not None and record.state is PeerState.UP):
            return Refusal(Why.DUPLICATE, "the two agents are connected already")
        return None

"""What connected agents tell each other beside data: cards, gossip, regions, words of backends."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from kvx.errors import KvxError, PeerLost
from kvx.transfer.agents import messages
from kvx.transfer.agents.messages import (
    BackendWord,
    Goodbye,
    KnownCards,
    Message,
    OwnCard,
    Reach,
    Regions,
)
from kvx.transfer.agents.metadata import decode_card

if TYPE_CHECKING:
    from collections.abc import Callable

    from kvx.transfer.agents.config import AgentConfig
    from kvx.transfer.agents.dialler import Dialler
    from kvx.transfer.agents.gossip import CardBook
    from kvx.transfer.agents.issuer import Issuer
    from kvx.transfer.agents.key import SharedKey
    from kvx.transfer.agents.membership import Membership
    from kvx.transfer.agents.roster import Lane, PeerRecord, Roster
    from kvx.transfer.core import LinkCore

_log = logging.getLogger(__name__)
_UNREACHED = "the peer has not said yet that it can copy out of this memory"


class Conversation:
    """The messages of one agent. Guarded by the roster's lock; hears on the agent's thread.

    Attributes:
        words: Messages for endpoints of backends that were not delivered yet: backend, peer, bytes.
        when_news: Called with a peer whose card has changed.
    """

    def __init__(
        self,
        core: LinkCore,
        config: AgentConfig,
        key: SharedKey | None,
        *,
        roster: Roster,
        membership: Membership,
        dialler: Dialler,
        book: CardBook,
        issuer: Issuer,
        wall_ns: Callable[[], int],
    ) -> None:
        """Begin in silence."""
        self._core = core
        self._config = config
        self._key = key
        self._roster = roster
        self._membership = membership
        self._dialler = dialler
        self._book = book
        self._issuer = issuer
        self._wall_ns = wall_ns
        self._regions: set[int] = set()
        self.words: list[tuple[str, str, bytes]] = []
        self.when_news: Callable[[PeerRecord], None] = lambda _: None

    def heard(self, connection: int, payload: bytes) -> None:
        """Take a message; whoever sends what is none loses the connection."""
        found = self._membership.lane(connection)
        if found is None:
            return
        record, lane = found
        try:
            self._answer(record, lane, messages.decode(payload))
        except KvxError as error:
            _log.warning("%s is cut off: %s", record.name, error)
            self._membership.drop(connection, f"a message that cannot be taken: {error}")

    def say(self, record: PeerRecord, message: Message) -> None:
        """Send a message.

        Raises:
            PeerLost: There is no connection.
        """
        lane = record.messenger()
        if lane is None:
            raise PeerLost(f"there is no connection to {record.name}", peer=record.name)
        self._core.send_message(lane.connection, messages.encode(message))

    def greet(self, record: PeerRecord) -> None:
        """Tell a peer that has come up what it should know, and others of it."""
        lane = record.messenger()
        if lane is not None and lane.is_unix and self._regions:
            self._try_say(record, Regions(sorted(self._regions)[: messages.REGIONS_MAX]))
        if self._config.gossip:
            for message in self._book.told(record.name, self._wall_ns()):
                self._try_say(record, message)

    def announce(self) -> None:
        """Issue the own card anew and send it to everybody."""
        self._issuer.issue()
        self._tell_all(OwnCard(self._issuer.data))

    def add_region(self, region: int) -> None:
        """Ask everybody on this host whether it can copy out of a new region."""
        self._regions.add(region)
        for record in self._roster.all():
            lane = record.messenger()
            if lane is not None and lane.is_unix:
                self._try_say(record, Regions([region]))

    def remove_region(self, region: int) -> None:
        """Forget a region."""
        self._regions.discard(region)
        for record in self._roster.all():
            record.objections.pop(region, None)

    def objection(self, number: int, region: int, patience_s: float = 0.0) -> str:
        """Return why a peer cannot copy out of a region of ours; empty when it said it can.

        A peer on this host that was not asked long ago is waited for.
        """
        record = self._roster.by_number(number)
        if record is None:
            return _UNREACHED
        told = record.objections.get(region)
        if told is None and patience_s > 0:
            with self._roster.changed:
                self._roster.changed.wait_for(
                    lambda: region in record.objections or not _is_beside_us(record), patience_s
                )
            told = record.objections.get(region)
        return _UNREACHED if told is None else told

    def farewell(self, reason: str) -> None:
        """Tell everybody that this agent closes."""
        self._tell_all(Goodbye(reason))

    def spread(self, known: list[bytes], besides: str) -> None:
        """Pass cards on to everybody but who they came from."""
        if not known or not self._config.gossip:
            return
        for record in self._roster.all():
            if record.name != besides and record.state.is_connected:
                for start in range(0, len(known), messages.CARDS_MAX):
                    self._try_say(record, KnownCards(known[start : start + messages.CARDS_MAX]))

    def _answer(self, record: PeerRecord, lane: Lane, message: Message) -> None:
        match message:
            case OwnCard():
                self._take_card(record, lane, message.card)
            case KnownCards():
                self._hear_of(record, message.cards)
            case Regions():
                self._reach(record, message.regions)
            case Reach():
                record.objections.update(
                    (region, text)
                    for region, text in message.objections.items()
                    if region in self._regions
                )
                self._roster.changed.notify_all()
            case Goodbye():
                record.reason = f"it said: {message.reason}"
            case BackendWord():
                self.words.append((message.backend, record.name, message.payload))

    def _take_card(self, record: PeerRecord, lane: Lane, data: bytes) -> None:
        card = decode_card(data, self._key)
        if card.identity != record.identity:
            raise PeerLost(f"it showed the card of {card.name}, another agent's", peer=record.name)
        is_news = record.card is None or card.is_newer(record.card)
        if is_news:
            record.card = card
            self._book.replace(card, data)
            self.when_news(record)
        if not lane.is_introduced:
            if not lane.is_dialled:
                self.say_on(lane, OwnCard(self._issuer.data))
            self._membership.introduced(record, lane)
        if is_news:
            self.spread([data], besides=record.name)

    def say_on(self, lane: Lane, message: Message) -> None:
        """Send a message over one connection."""
        self._core.send_message(lane.connection, messages.encode(message))

    def _hear_of(self, record: PeerRecord, cards: list[bytes]) -> None:
        if not self._config.gossip:
            return
        fresh = self._book.hear(cards, self._wall_ns())
        for known in fresh:
            self._dialler.hurry(known.card.name)
        self._roster.changed.notify_all()
        self.spread([known.data for known in fresh], besides=record.name)

    def _reach(self, record: PeerRecord, regions: list[int]) -> None:
        answers = {region: self._core.can_pull(record.number, region)[:512] for region in regions}
        self.say(record, Reach(answers))

    def _tell_all(self, message: Message) -> None:
        for record in self._roster.all():
            if record.state.is_connected:
                self._try_say(record, message)

    def _try_say(self, record: PeerRecord, message: Message) -> None:
        try:
            self.say(record, message)
        except KvxError as error:
            # Whoever takes nothing is lost soon, and told everything again when it is back.
            _log.debug("%s was not told: %s", record.name, error)


def _is_beside_us(record: PeerRecord) -> bool:
    """Return whether a peer is connected over a unix socket: only those are asked."""
    return any(lane.is_unix for lane in record.lanes.values())

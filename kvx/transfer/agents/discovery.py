"""How an agent comes to know others: static addresses, a shared directory, gossip, a mesh."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvx.transfer.agents.directory import CardDirectory

if TYPE_CHECKING:
    from collections.abc import Callable

    from kvx.transfer.agents.config import AgentConfig
    from kvx.transfer.agents.conversation import Conversation
    from kvx.transfer.agents.dialler import Dialler
    from kvx.transfer.agents.gossip import CardBook
    from kvx.transfer.agents.issuer import Issuer
    from kvx.transfer.agents.key import SharedKey
    from kvx.transfer.agents.metadata import AgentCard
    from kvx.transfer.agents.roster import Roster

_SCAN_EVERY_S = 0.5
# A card is renewed well before others forget it.
_RENEWALS = 3


class Discovery:
    """Looks for other agents now and then. Guarded by the roster's lock."""

    def __init__(
        self,
        config: AgentConfig,
        key: SharedKey | None,
        *,
        roster: Roster,
        dialler: Dialler,
        book: CardBook,
        issuer: Issuer,
        conversation: Conversation,
        clock: Callable[[], float],
        wall_ns: Callable[[], int],
    ) -> None:
        """Want the static peers, and leave a card in the shared directory.

        Raises:
            StorageError: The directory cannot be used.
        """
        self._config = config
        self._roster = roster
        self._dialler = dialler
        self._book = book
        self._issuer = issuer
        self._conversation = conversation
        self._clock = clock
        self._wall_ns = wall_ns
        self._due = clock()
        self._mesh: set[str] = set()
        self._directory: CardDirectory | None = None
        for address in config.peers:
            dialler.wish(address)
        if config.directory is not None:
            self._directory = CardDirectory(
                config.directory, key, forget_after_s=config.forget_after_s
            )
            self._directory.publish(issuer.card.name, issuer.data)

    def tick(self) -> None:
        """Look around, when it is time."""
        if self._clock() < self._due:
            return
        self._due = self._clock() + _SCAN_EVERY_S
        self.look()
        if self._issuer.is_older_than(self._config.forget_after_s / _RENEWALS):
            self.announce()
        self._forget()
        if self._config.mesh:
            self._join_all()

    def look(self) -> None:
        """Read what is new in the shared directory."""
        if self._directory is None:
            return
        found = self._directory.scan(self._wall_ns(), self._config.peers_max)
        taken = [data for card, data in found if self.take(card, data)]
        self._conversation.spread(taken, besides="")

    def take(self, card: AgentCard, data: bytes) -> bool:
        """Keep a card that was found or handed over; False when it was known, or newer is."""
        is_news = self._book.take(card, data)
        if is_news:
            self._dialler.hurry(card.name)
            self._roster.changed.notify_all()
        return is_news

    def announce(self) -> None:
        """Issue the own card anew, and let everybody have it."""
        self._conversation.announce()
        if self._directory is not None:
            self._directory.publish(self._issuer.card.name, self._issuer.data)

    def close(self) -> None:
        """Take the own card away."""
        if self._directory is not None:
            identity = self._issuer.card.identity
            self._directory.withdraw(identity.name, identity.incarnation)

    def _forget(self) -> None:
        wanted = {wish.target for wish in self._dialler.wishes} - self._mesh
        connected = {record.name for record in self._roster.all() if record.lanes}
        self._book.forget(wanted | connected, self._wall_ns())
        for name in self._mesh - {*self._book.names()}:
            self._mesh.discard(name)
            self._dialler.unwish(name)

    def _join_all(self) -> None:
        named = {wish.name for wish in self._dialler.wishes}
        for name in self._book.names():
            record = self._roster.current(name)
            if name not in named and (record is None or not record.lanes):
                self._mesh.add(name)
                self._dialler.wish(name, name)

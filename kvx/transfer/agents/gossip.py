"""The cards an agent has heard of, and who is to be told of them.

A card counts when it is newer than the one known and, with a key, signed. What was only heard of
and is not renewed by its owner is forgotten, so the dead do not circulate for ever.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING

from kvx.errors import KvxError
from kvx.transfer.agents.messages import CARDS_MAX, KnownCards
from kvx.transfer.agents.metadata import AgentCard, decode_card

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from kvx.transfer.agents.key import SharedKey

_log = logging.getLogger(__name__)
# Clocks of two machines may differ by so much.
_SKEW_S = 300.0


@dataclass(frozen=True, slots=True)
class Known:
    """A card and the bytes it came as, which are passed on with their signature."""

    card: AgentCard
    data: bytes


class CardBook:
    """The newest card of every name. Guarded by the roster's lock."""

    def __init__(
        self, own_name: str, key: SharedKey | None, *, cards_max: int, forget_after_s: float
    ) -> None:
        """Start empty."""
        self._own_name = own_name
        self._key = key
        self._cards_max = cards_max
        self._forget_after_s = forget_after_s
        self._known: dict[str, Known] = {}

    def get(self, name: str) -> AgentCard | None:
        """Return the newest card of a name."""
        known = self._known.get(name)
        return None if known is None else known.card

    def take(self, card: AgentCard, data: bytes) -> bool:
        """Keep a card; False when it is our own, no newer than what is known, or one too many."""
        if card.name == self._own_name:
            return False
        known = self._known.get(card.name)
        if known is None and len(self._known) >= self._cards_max:
            return False
        if known is not None and not card.is_newer(known.card):
            return False
        self._known[card.name] = Known(card, data)
        return True

    def replace(self, card: AgentCard, data: bytes) -> None:
        """Keep the card of a peer that has proven who it is, whatever was known."""
        if card.name in self._known or len(self._known) < self._cards_max:
            self._known[card.name] = Known(card, data)

    def hear(self, cards: Iterable[bytes], now_ns: int) -> list[Known]:
        """Keep what is new of the cards that a peer passed on, and return it."""
        fresh = []
        for data in cards:
            try:
                card = decode_card(data, self._key)
            except KvxError as error:
                _log.warning("a card that was passed on is not taken: %s", error)
                continue
            if self.is_fresh(card, now_ns) and self.take(card, data):
                fresh.append(Known(card, data))
        return fresh

    def is_fresh(self, card: AgentCard, now_ns: int) -> bool:
        """Return whether a card that was only heard of is young enough, and not of the future."""
        return -_SKEW_S <= card.age_s(now_ns) <= self._forget_after_s and not card.host.is_dead()

    def forget(self, keep: set[str], now_ns: int) -> None:
        """Drop outdated cards, but for those of `keep`."""
        self._known = {
            name: known
            for name, known in self._known.items()
            if name in keep or self.is_fresh(known.card, now_ns)
        }

    def names(self) -> list[str]:
        """Return whose cards are known."""
        return sorted(self._known)

    def told(self, besides: str, now_ns: int) -> Iterator[KnownCards]:
        """Yield the messages that tell a peer of everybody but itself."""
        rest = [
            known.data
            for name, known in self._known.items()
            if name != besides and self.is_fresh(known.card, now_ns)
        ]
        for start in range(0, len(rest), CARDS_MAX):
            yield KnownCards(rest[start : start + CARDS_MAX])

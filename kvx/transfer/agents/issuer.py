"""The card of this agent: built from what is known now, and issued anew when that changes."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvx.transfer.agents.metadata import AgentCard, encode_card

if TYPE_CHECKING:
    from collections.abc import Callable

    from kvx.transfer.agents.identity import HostIdentity, Identity
    from kvx.transfer.agents.key import SharedKey


class Issuer:
    """Issues cards, each with the next sequence number. Guarded by the roster's lock."""

    def __init__(
        self,
        identity: Identity,
        key: SharedKey | None,
        *,
        here: HostIdentity,
        addresses: tuple[str, ...],
        backend_cards: Callable[[], dict[str, bytes]],
        wall_ns: Callable[[], int],
    ) -> None:
        """Issue the first card."""
        self._identity = identity
        self._key = key
        self._here = here
        self._addresses = addresses
        self._backend_cards = backend_cards
        self._wall_ns = wall_ns
        self._sequence = 0
        self.issue()

    def issue(self) -> bytes:
        """Make a new edition and return it.

        Raises:
            CapacityError: It would be larger than a card may be.
        """
        self._sequence += 1
        self.card = AgentCard(
            self._identity,
            self._sequence,
            self._wall_ns(),
            self._addresses,
            self._here,
            self._backend_cards(),
        )
        self.data = encode_card(self.card, self._key)
        return self.data

    def is_older_than(self, age_s: float) -> bool:
        """Return whether the present edition was issued so long ago."""
        return self.card.age_s(self._wall_ns()) > age_s

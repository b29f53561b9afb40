"""The card of an agent: what others must know to reach it. Signed when there is a key.

A card says nothing of memory: regions are named by leases only. Of two cards of one name the newer
one counts, by (started, incarnation, sequence), so a replayed or forged old one changes nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import msgspec

from kvx.errors import CapacityError, UsageError
from kvx.transfer.agents.identity import Count, HostIdentity, Identity
from kvx.transfer.agents.key import SharedKey
from kvx.transfer.agents.sealed import Kind, seal, unseal

CARD_BYTES_MAX = 64 << 10
ADDRESSES_MAX = 16
BACKENDS_MAX = 16

_Address = Annotated[str, msgspec.Meta(min_length=1, max_length=256)]
_BackendName = Annotated[str, msgspec.Meta(pattern="^[a-z][a-z0-9_-]{0,31}$")]
_BackendCard = Annotated[bytes, msgspec.Meta(max_length=16 << 10)]


class AgentCard(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What an agent says of itself.

    Attributes:
        identity: Whose card it is.
        sequence: Grows with every change within one life.
        issued_ns: Unix time of this edition; gossip forgets old ones.
        addresses: Where it listens, best first.
        host: Where it runs.
        backends: What its endpoint of each backend says.
    """

    identity: Identity
    sequence: Count
    issued_ns: Count
    addresses: Annotated[tuple[_Address, ...], msgspec.Meta(max_length=ADDRESSES_MAX)]
    host: HostIdentity
    backends: Annotated[dict[_BackendName, _BackendCard], msgspec.Meta(max_length=BACKENDS_MAX)]

    @property
    def name(self) -> str:
        """Name of the agent."""
        return self.identity.name

    def is_newer(self, than: AgentCard) -> bool:
        """Return whether this card replaces another one of the same name."""
        if self.identity.incarnation != than.identity.incarnation:
            return self.identity.is_newer(than.identity)
        return self.sequence > than.sequence

    def age_s(self, now_ns: int) -> float:
        """Return how long ago it was issued, as far as the two clocks agree."""
        return (now_ns - self.issued_ns) / 1e9


@dataclass(frozen=True, slots=True)
class PeerInfo:
    """What a card told.

    Attributes:
        name: Of the peer.
        incarnation: Its life.
        addresses: Where it listens.
        is_same_host: Whether it runs on this machine.
        backends: Names of the backends that it has open.
    """

    name: str
    incarnation: int
    addresses: tuple[str, ...]
    is_same_host: bool
    backends: tuple[str, ...]


_decoder = msgspec.msgpack.Decoder(AgentCard)


def encode_card(card: AgentCard, key: SharedKey | None) -> bytes:
    """Return a card as bytes.

    Raises:
        CapacityError: It is larger than a card may be; names the backend that takes most of it.
    """
    data = seal(Kind.CARD, msgspec.msgpack.encode(card), key)
    if len(data) > CARD_BYTES_MAX:
        sizes = {name: len(said) for name, said in card.backends.items()}
        largest = max(sizes, key=lambda name: sizes[name], default="none")
        raise CapacityError(
            f"the card of {card.name} has {len(data)} bytes, at most {CARD_BYTES_MAX} are "
            f"possible; backend {largest} takes {sizes.get(largest, 0)} of them: leave it out of "
            "`backends`",
            needed_bytes=len(data),
            available_bytes=CARD_BYTES_MAX,
        )
    return data


def decode_card(data: bytes, key: SharedKey | None) -> AgentCard:
    """Return the card in these bytes.

    Raises:
        UsageError: They are no card.
        IncompatibleError: Another version, or not signed with `key`.
    """
    body = unseal(Kind.CARD, data, key, bytes_max=CARD_BYTES_MAX)
    try:
        return _decoder.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise UsageError(f"the card is malformed: {error}") from None

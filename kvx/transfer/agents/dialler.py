"""Whom an agent wants to be connected with, and the attempts to get there.

A wish names a peer, or an address whose peer is not known yet. Its addresses are tried in order;
after a round without success the next one waits, longer each time.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from kvx.errors import KvxError
from kvx.transfer.agents.address import (
    Address,
    TcpAddress,
    UnixAddress,
    is_address,
    is_loopback,
    parse_address,
)
from kvx.transfer.agents.backoff import Backoff
from kvx.transfer.agents.handshake import Refusal, Why
from kvx.transfer.agents.neighbours import Door, find_door

if TYPE_CHECKING:
    import random
    from collections.abc import Callable

    from kvx.transfer.agents.config import AgentConfig
    from kvx.transfer.agents.identity import HostIdentity
    from kvx.transfer.agents.metadata import AgentCard
    from kvx.transfer.core import CoreMaker, LinkCore

_log = logging.getLogger(__name__)
_DIAL_S_MAX = 5.0
# Whoever has not answered after so long may be out of reach from here, though not from there.
_PROMISING_S = 1.0


@dataclass(slots=True, eq=False)
class Wish:
    """Somebody to be connected with.

    Attributes:
        target: Name or address, as it was asked for.
        name: Of the peer; None while only its address is known.
        failures: Rounds without success in a row.
        due: When to try next, by the agent's clock.
        place: Which of the addresses comes next.
        connection: The attempt under way; 0 for none.
        error: Why the last attempt failed.
        refusal: What the other side, or this one, had against it.
    """

    target: str
    name: str | None
    failures: int = 0
    due: float = 0.0
    place: int = 0
    connection: int = 0
    error: str = ""
    refusal: Refusal | None = None


@dataclass(frozen=True, slots=True)
class Attempt:
    """A connection that this agent dialled, until it is approved or gone."""

    wish: Wish
    address: str
    lane: int
    is_local: bool
    began: float


def routes(card: AgentCard, here: HostIdentity, *, is_unix_first: bool) -> list[Address | Door]:
    """Return where a card's agent can be reached from here, best first.

    Args:
        card: Whom to reach.
        here: Where this agent runs.
        is_unix_first: Whether ways within this host go before TCP, or behind it.
    """
    is_same_host = card.host.is_same_host(here)
    addresses = [parse_address(text) for text in card.addresses if is_address(text)]
    door = find_door(card.identity.incarnation) if card.host.is_same_process(here) else None
    near: list[Address | Door] = [] if door is None else [door]
    if is_same_host and card.host.uid == here.uid:
        near += [one for one in addresses if isinstance(one, UnixAddress) and _is_socket(one)]
    is_same_net = is_same_host and card.host.net_namespace == here.net_namespace
    far: list[Address | Door] = [
        one
        for one in addresses
        if isinstance(one, TcpAddress) and (is_same_net or not is_loopback(one.host))
    ]
    return near + far if is_unix_first else far + near


class Dialler:
    """The wishes of one agent. Guarded by the roster's lock; acts on the agent's thread."""

    def __init__(
        self,
        core: LinkCore,
        maker: CoreMaker,
        config: AgentConfig,
        *,
        tls: object,
        here: HostIdentity,
        card_of: Callable[[str], AgentCard | None],
        clock: Callable[[], float],
        rng: random.Random,
    ) -> None:
        """Begin without wishes.

        Args:
            core: Dials.
            maker: Joins two cores of one process.
            config: Says how patient to be, and which ways are allowed.
            tls: For connections over TCP; None without.
            here: Where this agent runs.
            card_of: The newest card of a name.
            clock: Monotonic seconds.
            rng: Source of chance.
        """
        self._core = core
        self._maker = maker
        self._tls = tls
        self._here = here
        self._card_of = card_of
        self._clock = clock
        self._rng = rng
        self._backoff = Backoff(config.redial_s, config.redial_max_s)
        self._is_unix_first = not config.backends or bool({"local", "shm"} & {*config.backends})
        self._wishes: dict[str, Wish] = {}
        self._attempts: dict[int, Attempt] = {}

    @property
    def wishes(self) -> list[Wish]:
        """All wishes."""
        return list(self._wishes.values())

    def wish(self, target: str, name: str | None = None) -> Wish:
        """Want somebody, at once; an older wish for the same is kept and hurried."""
        if target not in self._wishes:
            self._wishes[target] = Wish(target, name)
        wish = self._wishes[target]
        wish.due, wish.failures, wish.error, wish.refusal = self._clock(), 0, "", None
        return wish

    def unwish(self, name: str) -> None:
        """Want somebody no more, under whatever address."""
        gone = [key for key, wish in self._wishes.items() if name in (wish.name, wish.target)]
        for key in gone:
            del self._wishes[key]

    def hurry(self, name: str) -> None:
        """Try at once to reach somebody of whom there is news."""
        for wish in self._wishes.values():
            if wish.name == name and not wish.connection:
                wish.due, wish.place = self._clock(), 0

    def is_dialling(self, name: str) -> bool:
        """Return whether an attempt at this name is under way, and still likely to succeed."""
        since = self._clock() - _PROMISING_S
        return any(
            attempt.wish.name == name and attempt.lane == 0 and attempt.began >= since
            for attempt in self._attempts.values()
        )

    def next_due(self) -> float:
        """Return when `dial` has something to do, if nothing else happens."""
        return min(
            (wish.due for wish in self._wishes.values() if not wish.connection),
            default=float("inf"),
        )

    def dial(self, is_connected: Callable[[Wish], bool]) -> None:
        """Begin every attempt that is due."""
        now = self._clock()
        for wish in list(self._wishes.values()):
            if wish.connection or wish.due > now:
                continue
            if is_connected(wish):
                wish.due = float("inf")
                continue
            self._try_next(wish)

    def dial_lane(self, wish: Wish, address: str, lane: int) -> None:
        """Begin one more connection to where a peer was reached already."""
        found = parse_address(address)
        if isinstance(found, TcpAddress):
            self._begin(wish, found, lane)

    def attempt(self, connection: int) -> Attempt | None:
        """Return what this agent dialled under this number; None when somebody else did."""
        return self._attempts.get(connection)

    def succeeded(self, connection: int, name: str) -> Attempt | None:
        """Note that an attempt has become a connection; returns what it was."""
        attempt = self._attempts.pop(connection, None)
        if attempt is not None and attempt.lane == 0:
            wish = attempt.wish
            wish.connection, wish.failures, wish.place = 0, 0, 0
            wish.name, wish.due, wish.error = name, float("inf"), ""
        return attempt

    def failed(self, connection: int, reason: str, refusal: Refusal | None = None) -> None:
        """Note that an attempt has come to nothing; the next one is planned."""
        attempt = self._attempts.pop(connection, None)
        if attempt is not None and attempt.lane == 0:
            attempt.wish.connection = 0
            attempt.wish.refusal = refusal
            if refusal is not None and refusal.why is Why.SELF:
                # A list of peers may be the same for all agents, and so name each one itself.
                self._wishes.pop(attempt.wish.target, None)
            self._plan_next(attempt.wish, f"{attempt.address}: {reason}")

    def lost(self, name: str) -> None:
        """Note that a peer has no connection left: whoever wants it tries again."""
        for wish in self._wishes.values():
            if wish.name == name and not wish.connection:
                wish.place, wish.failures = 0, 1
                wish.due = self._clock() + self._backoff.delay_s(1, self._rng)

    def _try_next(self, wish: Wish) -> None:
        found = self._addresses(wish)
        if not found:
            self._plan_next(wish, f"no address of {wish.target} is known")
            return
        where = found[min(wish.place, len(found) - 1)]
        self._begin(wish, where, 0)

    def _begin(self, wish: Wish, where: Address | Door, lane: int) -> None:
        try:
            connection, is_local = self._dial(where)
        except KvxError as error:
            if lane == 0:
                self._plan_next(wish, f"{_shown(where)}: {error}")
            return
        self._attempts[connection] = Attempt(wish, _shown(where), lane, is_local, self._clock())
        if lane == 0:
            wish.connection = connection

    def _dial(self, where: Address | Door) -> tuple[int, bool]:
        match where:
            case Door():
                ours, _ = self._maker.pair(self._core, where.core)
                return ours, True
            case UnixAddress():
                return self._core.dial_unix(where.path, _DIAL_S_MAX), True
            case TcpAddress():
                connection = self._core.dial_tcp(where.host, where.port, self._tls, _DIAL_S_MAX)
                return connection, is_loopback(where.host)

    def _addresses(self, wish: Wish) -> list[Address | Door]:
        if is_address(wish.target):
            return [parse_address(wish.target)]
        card = self._card_of(wish.target)
        if card is None:
            return []
        return routes(card, self._here, is_unix_first=self._is_unix_first)

    def _plan_next(self, wish: Wish, error: str) -> None:
        """Go on to the next address, or wait for the next round."""
        wish.error = error
        wish.place += 1
        if wish.place < len(self._addresses(wish)):
            wish.due = self._clock()
            return
        wish.place = 0
        wish.failures += 1
        wish.due = self._clock() + self._backoff.delay_s(wish.failures, self._rng)
        _log.debug("%s is not reached: %s", wish.target, error)


def _is_socket(address: UnixAddress) -> bool:
    return Path(address.path).is_socket()


def _shown(where: Address | Door) -> str:
    return "this process" if isinstance(where, Door) else str(where)

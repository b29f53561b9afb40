"""The parts of one agent, put together.

They know each other, and not the agent: so an agent that was forgotten can be freed, and its parts
close themselves.
"""

from __future__ import annotations

import functools
import logging
import random
import time
import warnings
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from kvx.errors import PeerLost
from kvx.transfer.agents.conversation import Conversation
from kvx.transfer.agents.dialler import Dialler
from kvx.transfer.agents.discovery import Discovery
from kvx.transfer.agents.gossip import CardBook
from kvx.transfer.agents.identity import HostIdentity, Identity, host_identity
from kvx.transfer.agents.instruments import AgentInstruments
from kvx.transfer.agents.issuer import Issuer
from kvx.transfer.agents.loop import Loop, Notification
from kvx.transfer.agents.mailbox import Mailbox
from kvx.transfer.agents.membership import Membership
from kvx.transfer.agents.messages import BACKEND_BYTES_MAX, BackendWord
from kvx.transfer.agents.mourning import Mourning
from kvx.transfer.agents.neighbours import Door, open_door
from kvx.transfer.agents.reception import Reception
from kvx.transfer.agents.roster import PeerRecord, Roster
from kvx.transfer.agents.sockets import Listeners, check_key, wanted
from kvx.transfer.agents.transfers import TransferDesk
from kvx.transfer.agents.ways import Ways, load_backends
from kvx.transfer.backend import BackendHost, LeaseUse, Memory

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from kvx.transfer.agents.config import AgentConfig, TlsFiles
    from kvx.transfer.agents.key import SharedKey
    from kvx.transfer.agents.peer_state import PeerEvent
    from kvx.transfer.backend import Backend
    from kvx.transfer.core import CoreMaker, LeaseRef, LinkCore

_log = logging.getLogger(__name__)
_FORGOTTEN_TIMEOUT_S = 1.0
_TICKS_MIN_S, _TICKS_MAX_S = 0.02, 0.25
# Memory that threads or devices were still at when its agent was closed: it must outlive them.
_ABANDONED: list[Memory] = []


@dataclass(frozen=True, slots=True)
class AgentCloseReport:
    """What `Agent.close` had to leave behind.

    Attributes:
        cancelled_transfers: Transfers of this agent that were under way.
        abandoned_transfers: Of those, the ones whose bytes were still moving.
        abandoned_bytes: Their bytes; that memory is never freed.
    """

    cancelled_transfers: int
    abandoned_transfers: int
    abandoned_bytes: int


@dataclass(slots=True, eq=False)
class AgentParts:
    """What an agent consists of.

    Attributes:
        memories: What is registered, by region; keeps it alive.
        is_open: False once `close` has begun.
    """

    identity: Identity
    config: AgentConfig
    key: SharedKey | None
    core: LinkCore
    maker: CoreMaker
    roster: Roster
    book: CardBook
    dialler: Dialler
    membership: Membership
    conversation: Conversation
    discovery: Discovery
    issuer: Issuer
    ways: Ways
    desk: TransferDesk
    instruments: AgentInstruments
    loop: Loop
    listeners: Listeners
    notes: Mailbox[Notification]
    events: Mailbox[PeerEvent]
    door: Door | None
    memories: dict[int, Memory] = field(default_factory=dict)
    is_open: bool = True

    def close(self, timeout_s: float) -> AgentCloseReport:
        """End everything within a bound; calling it twice does no harm."""
        with self.roster.changed:
            if not self.is_open:
                return AgentCloseReport(0, 0, 0)
            self.is_open = False
            self.door = None
            self.discovery.close()
            self.conversation.farewell("it was closed")
            self.roster.changed.notify_all()
        end = time.monotonic() + timeout_s
        cancelled, abandoned, abandoned_bytes = self.core.close(timeout_s)
        self.ways.close(max(0.0, end - time.monotonic()))
        self.loop.stop()
        self.desk.end_all()
        self.listeners.close()
        self.notes.close()
        self.events.close()
        if abandoned:
            _ABANDONED.extend(self.memories.values())
        self.memories.clear()
        _untie(self)
        return AgentCloseReport(cancelled, abandoned, abandoned_bytes)

    def forget(self) -> None:
        """Close what nobody closed, and say so."""
        if self.is_open:
            self.close(_FORGOTTEN_TIMEOUT_S)
            warnings.warn(
                f"agent {self.identity.name} was never closed", ResourceWarning, stacklevel=2
            )

    def number_of(self, peer: str) -> int:
        """Return what the native core calls a peer; PeerLost when it was never met."""
        record = self.roster.current(peer)
        if record is None:
            raise PeerLost(f"{peer} is not connected", peer=peer)
        return record.number

    def say(self, backend: str, peer: str, payload: bytes) -> None:
        """Send a message between endpoints of a backend."""
        record = self.roster.current(peer)
        if record is None:
            raise PeerLost(f"{peer} is not connected", peer=peer)
        assert len(payload) <= BACKEND_BYTES_MAX, "a backend's message is small"
        self.conversation.say(record, BackendWord(backend, payload))


def assemble(
    identity: Identity,
    config: AgentConfig,
    maker: CoreMaker,
    *,
    listen: str | Sequence[str] | None,
    key: SharedKey | None,
    tls: TlsFiles | None,
    backends: Sequence[Backend] | None = None,
    clock: Callable[[], float] = time.monotonic,
    wall_ns: Callable[[], int] = time.time_ns,
    rng: random.Random | None = None,
) -> AgentParts:
    """Put an agent together; everything is closed again when it cannot be.

    Raises:
        KvxError: Something cannot be had; says what.
    """
    wished = wanted(listen)
    check_key(wished, has_key=key is not None)
    core = maker.agent(
        io_threads=config.io_threads,
        copy_threads=config.copy_threads,
        greeting_s=config.greeting_s,
        ping_s=config.ping_s,
        piece_bytes=config.piece_bytes,
        cancel_grace_s=config.cancel_grace_s,
    )
    listeners = Listeners(core, identity, config)
    try:
        context = None
        if tls is not None:
            context = maker.tls(str(tls.certificate), str(tls.private_key), str(tls.authority))
        listeners.listen(wished, context)
        assembly = _Assembly(identity, key, config, core, maker, clock, wall_ns)
        return assembly.put_together(context, listeners, backends, rng or random.Random())
    except BaseException:
        core.close(0.0)
        listeners.close()
        raise


@dataclass(slots=True)
class _Assembly:
    """What all parts are made from."""

    identity: Identity
    key: SharedKey | None
    config: AgentConfig
    core: LinkCore
    maker: CoreMaker
    clock: Callable[[], float]
    wall_ns: Callable[[], int]
    here: HostIdentity = field(default_factory=host_identity)

    def put_together(
        self, tls: object, listeners: Listeners, backends: Sequence[Backend] | None,
        rng: random.Random,
    ) -> AgentParts:  # fmt: skip
        config, core, clock = self.config, self.core, self.clock
        found, failures = load_backends() if backends is None else (list(backends), {})
        roster = Roster()
        ways = Ways(found, failures, allowed=config.backends, here=self.here, roster=roster)
        book = CardBook(
            self.identity.name, self.key, cards_max=config.peers_max,
            forget_after_s=config.forget_after_s,
        )  # fmt: skip
        dialler = Dialler(
            core, self.maker, config, tls=tls, here=self.here, card_of=book.get, clock=clock,
            rng=rng,
        )  # fmt: skip
        issuer = Issuer(
            self.identity, self.key, here=self.here, addresses=listeners.told(),
            backend_cards=ways.cards, wall_ns=self.wall_ns,
        )  # fmt: skip
        reception = Reception(core, self.identity, self.key, config, roster=roster, dialler=dialler)
        membership = Membership(
            core, config, roster=roster, dialler=dialler, reception=reception, issuer=issuer,
            clock=clock,
        )  # fmt: skip
        conversation = Conversation(
            core, config, self.key, roster=roster, membership=membership, dialler=dialler,
            book=book, issuer=issuer, wall_ns=self.wall_ns,
        )  # fmt: skip
        instruments = AgentInstruments(core, roster)
        desk = TransferDesk(instruments)
        notes: Mailbox[Notification] = Mailbox(config.events_max)
        events: Mailbox[PeerEvent] = Mailbox(config.events_max)
        discovery = Discovery(
            config, self.key, roster=roster, dialler=dialler, book=book, issuer=issuer,
            conversation=conversation, clock=clock, wall_ns=self.wall_ns,
        )  # fmt: skip
        tick_s = min(config.ping_s, config.suspect_after_s / 4) / 2
        loop = Loop(
            core, self.identity.name, tick_s=min(max(tick_s, _TICKS_MIN_S), _TICKS_MAX_S),
            roster=roster, membership=membership, conversation=conversation, discovery=discovery,
            dialler=dialler, desk=desk, instruments=instruments, notes=notes, events=events,
            clock=clock,
        )  # fmt: skip
        parts = AgentParts(
            self.identity, config, self.key, core, self.maker, roster, book, dialler, membership,
            conversation, discovery, issuer, ways, desk, instruments, loop, listeners, notes,
            events, open_door(self.identity.incarnation, core) if config.unix else None,
        )  # fmt: skip
        _join_up(parts)
        return parts


def _join_up(parts: AgentParts) -> None:
    """Tie the knots that are left: endpoints, and what follows when a peer comes or goes."""
    mourning = Mourning()
    parts.loop.tickers.append(mourning.tick)

    def host_of(name: str) -> BackendHost:
        def take_words(taker: Callable[[str, bytes], None]) -> None:
            parts.loop.word_takers[name] = taker

        def use_lease(peer: str, lease: LeaseRef, rights: int) -> LeaseUse:
            return parts.core.use_lease(lease, parts.number_of(peer), rights)

        return BackendHost(
            agent=parts.identity.name,
            incarnation=parts.identity.incarnation,
            core=parts.core,
            send=lambda peer, payload: parts.say(name, peer, payload),
            on_message=take_words,
            ended=lambda job: parts.desk.ended(name, job),
            card_changed=lambda: _announce(parts),
            use_lease=use_lease,
            deliver=lambda peer, note: parts.notes.put(Notification(peer, note)),
            on_lost=mourning.takers.append,
            number_of=parts.number_of,
            sight=lambda peer: parts.core.sight(parts.number_of(peer)),
            verifies_device=parts.config.verify_device,
            peer_objection=parts.conversation.objection,
        )

    def came(record: PeerRecord) -> None:
        parts.ways.renew(record)
        parts.conversation.greet(record)

    def went(record: PeerRecord) -> None:
        channels = parts.ways.forget(record)
        parts.loop.chores += [functools.partial(channel.close, 0.0) for channel in channels]
        parts.loop.chores.append(functools.partial(mourning.lost, record))

    parts.membership.when_up = came
    parts.membership.when_down = went
    parts.conversation.when_news = parts.ways.renew
    parts.ways.open(host_of)
    if any(parts.ways.cards().values()):
        _announce(parts)


def _untie(parts: AgentParts) -> None:
    """Undo `_join_up`: else a closed core keeps its descriptors until the garbage collector comes.

    The endpoints, which know all parts, were let go of by `Ways.close`.
    """

    def nothing(_: PeerRecord) -> None:
        """Do nothing: nobody comes or goes any more."""

    parts.membership.when_up = parts.membership.when_down = nothing
    parts.conversation.when_news = nothing
    parts.loop.callbacks.clear()
    parts.loop.word_takers.clear()
    parts.loop.chores.clear()


def _announce(parts: AgentParts) -> None:
    with parts.roster.changed:
        if parts.is_open:
            parts.discovery.announce()

"""What a cache and its peers say to each other, and who is there to be asked.

Messages are taken on the reactor's thread, in order; only answers to asks are taken at once, on the
agent's thread.
"""

from __future__ import annotations

import functools
import itertools
import logging
import threading
from typing import TYPE_CHECKING

from kvx.cache.peer import messages
from kvx.cache.peer.messages import (
    KEY_BYTES,
    TOPIC,
    Ask,
    Delta,
    Grant,
    Offer,
    Release,
    SnapshotPart,
    Subscribe,
    Withdrawal,
)
from kvx.cache.peer.replica import Replica
from kvx.cache.peer.source import Source
from kvx.cache.reasons import MissReason
from kvx.errors import KvxError
from kvx.transfer.agents.peer_state import PeerDown, PeerState, PeerUp

if TYPE_CHECKING:
    from collections.abc import Callable

    import numpy as np
    import numpy.typing as npt

    from kvx.cache.peer.granting import Granting
    from kvx.cache.peer.instruments import PeerInstruments
    from kvx.cache.peer.messages import Message
    from kvx.cache.peer.publisher import Publisher
    from kvx.cache.reactor import Reactor
    from kvx.config import BreakerConfig
    from kvx.tier_config import PeerTierConfig
    from kvx.transfer.agents.agent import Agent
    from kvx.transfer.agents.peer_state import PeerEvent

_log = logging.getLogger(__name__)
# Messages that wait for the reactor; what comes beyond is thrown away, and asked for again.
_WAITING_BYTES_MAX = 64 << 20
# Lost peers whose keys are remembered, to say why blocks are missing.
_LOST_MAX = 8


class Talk:
    """The conversation of one cache with all peers. Thread-safe.

    Attributes:
        when_answered: Called with (peer, grant), on the agent's thread; False when it is too late.
        when_lost: Called with the name of a peer that is gone.
    """

    def __init__(
        self,
        agent: Agent,
        reactor: Reactor,
        config: PeerTierConfig,
        breaker: BreakerConfig,
        instruments: PeerInstruments,
    ) -> None:
        """Be silent; `start` begins."""
        self._agent = agent
        self._reactor = reactor
        self._config = config
        self._breaker = breaker
        self._instruments = instruments
        self._publisher: Publisher | None = None
        self._granting: Granting | None = None
        self._sources: dict[str, Source] = {}
        self._ordinals = itertools.count(1)
        self._lock = threading.Lock()
        self._waiting_bytes = 0
        self._unlisten: Callable[[], None] = lambda: None
        self.is_open = True
        self.when_answered: Callable[[str, Grant], bool] = lambda *_: False
        self.when_lost: Callable[[str], None] = lambda _: None

    def start(self, publisher: Publisher, granting: Granting) -> None:
        """Begin to listen, and meet who is connected already.

        Args:
            publisher: Tells peers what is here; used when this cache serves.
            granting: Lends it to them; likewise.
        """
        if self._config.serve:
            self._publisher, self._granting = publisher, granting
        self._agent.hear(TOPIC, self._heard)
        self._unlisten = self._agent.on_event(self._event)
        for name, peer in self._agent.peers.items():
            if peer.state is PeerState.UP:
                self.soon(functools.partial(self._came, name))
        for target in self._config.peers:
            self._agent.seek(target)

    @property
    def sources(self) -> list[Source]:
        """The peers that were met, in their present lives."""
        return list(self._sources.values())

    def expect(self, peer: str, keys: npt.NDArray[np.uint8]) -> None:
        """Add (n, 16) uint8 keys to what a peer holds, on the thread that takes messages."""
        source = self._sources.get(peer)
        if source is not None and self.is_open:
            source.replica.expect(keys)

    def stop(self) -> None:
        """Take no more messages but answers, and say so."""
        self.is_open = False
        self._unlisten()
        if self._publisher is not None:
            self._publisher.close()
            for source in self.sources:
                self.try_say(source.name, Withdrawal(self._publisher.log))

    def close(self) -> None:
        """Hear nothing any more."""
        self._agent.hear(TOPIC, None)

    def soon(self, callback: Callable[[], None]) -> None:
        """Run something on the thread that takes messages."""
        self._reactor.call_later(0.0, callback)

    def say(self, peer: str, payload: bytes) -> None:
        """Send a message; raises KvxError when it cannot."""
        self._agent.say(peer, TOPIC, payload)

    def try_say(self, peer: str, message: Message) -> bool:
        """Send a message; False when it cannot."""
        try:
            self.say(peer, messages.encode(message))
        except KvxError as error:
            _log.debug("%s was not told: %s", peer, error)
            return False
        return True

    def _heard(self, peer: str, payload: bytes) -> None:
        """Take a message, on the agent's thread."""
        try:
            message = messages.decode(payload)
        except KvxError as error:
            _log.warning("%s: %s", peer, error)
            return
        if isinstance(message, Grant):
            if not self.when_answered(peer, message) and message.token:
                self.try_say(peer, Release(message.number, 0, b""))
            return
        with self._lock:
            if self._waiting_bytes + len(payload) > _WAITING_BYTES_MAX:
                _log.debug("a message of %s is thrown away: too many wait", peer)
                return
            self._waiting_bytes += len(payload)
        self.soon(functools.partial(self._take_waiting, peer, message, len(payload)))

    def _take_waiting(self, peer: str, message: Message, size_bytes: int) -> None:
        with self._lock:
            self._waiting_bytes -= size_bytes
        match message:
            case Ask():
                self._asked(peer, message)
            case Release():
                if self._granting is not None:
                    self._granting.released(peer, message)
            case Subscribe():
                if self._publisher is not None and self.is_open:
                    self._publisher.subscribe(peer, message)
            case _:
                source = self._sources.get(peer)
                if source is not None and self.is_open:
                    self._learn(source, message)

    def _learn(self, source: Source, message: Message) -> None:
        """Take what a peer says of its blocks."""
        replica = source.replica
        match message:
            case Offer():
                self._subscribe(source)
            case Withdrawal():
                source.replica = Replica(self._config.known_blocks_max)
            case SnapshotPart():
                source.is_resyncing = source.is_resyncing and message.number > 0
                if not replica.take_part(message):
                    self._resync(source)
            case Delta():
                if not replica.take_delta(message):
                    self._resync(source)

    def _asked(self, peer: str, ask: Ask) -> None:
        if self._granting is not None:
            self._granting.asked(peer, ask)
        else:
            reasons = bytes([MissReason.EVICTED]) * (len(ask.keys) // KEY_BYTES)
            self.try_say(peer, Grant(ask.number, b"", reasons, b""))

    def _resync(self, source: Source) -> None:
        """Ask for everything anew, once: what comes before that is of no use."""
        if not source.is_resyncing:
            self._instruments.note_resync(source.name)
            source.is_resyncing = self.try_say(source.name, Subscribe(0, 0))

    def _subscribe(self, source: Source) -> None:
        self.try_say(source.name, Subscribe(source.replica.log, source.replica.sequence))

    def _event(self, event: PeerEvent) -> None:
        """Hear of a peer, on the agent's thread."""
        if isinstance(event, PeerUp):
            self.soon(functools.partial(self._came, event.name))
        elif isinstance(event, PeerDown):
            self.soon(functools.partial(self._went, event.name))

    def _came(self, name: str) -> None:
        peer = self._agent.peers.get(name)
        if peer is None or not self.is_open:
            return
        source = self._sources.get(name)
        if source is None or source.peer != peer:
            source = Source(
                next(self._ordinals), peer, self._breaker,
                known_blocks_max=self._config.known_blocks_max,
            )  # fmt: skip
            self._sources[name] = source
        source.breaker.success()
        source.is_resyncing = False
        self._subscribe(source)
        if self._publisher is not None:
            self.try_say(name, Offer(self._publisher.log))

    def _went(self, name: str) -> None:
        """End what goes on with a peer that is gone; one that is back already begins anew."""
        if self._publisher is not None and self._granting is not None:
            self._publisher.unsubscribe(name)
            self._granting.lost(name)
        self.when_lost(name)
        lost = [one for one in self.sources if not one.peer.state.is_connected]
        for source in lost[:-_LOST_MAX]:
            del self._sources[source.name]

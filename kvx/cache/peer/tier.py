"""The peer tier: what other caches hold, as one more place where blocks are looked for.

It is connected through an agent, its own or one that the application shares.
"""

from __future__ import annotations

import itertools
import logging
import threading
import time
import weakref
from typing import TYPE_CHECKING

import numpy as np

from kvx.cache.peer.asking import LeaseAsk, PeerRead
from kvx.cache.peer.choice import choose
from kvx.cache.peer.granting import Granting
from kvx.cache.peer.instruments import PeerInstruments
from kvx.cache.peer.messages import SUSPECTS_MAX, Ask, Release
from kvx.cache.peer.publisher import Publisher
from kvx.cache.peer.talk import Talk
from kvx.errors import KvxError, TransferTimeout

if TYPE_CHECKING:
    from collections.abc import Callable

    import numpy.typing as npt

    from kvx.cache.peer.messages import Grant
    from kvx.cache.peer.source import Source
    from kvx.cache.shared import Shared
    from kvx.config import BreakerConfig
    from kvx.tier_config import PeerTierConfig
    from kvx.transfer.agents.agent import Agent
    from kvx.transfer.agents.lease_token import RemoteLease

    Keys = npt.NDArray[np.uint8]
    Mask = npt.NDArray[np.bool_]

_log = logging.getLogger(__name__)
_DEADLINE_S_MIN = 0.001
_AGENT_SHARE = 0.5


class PeerTier:
    """Blocks of peers, and ours for them. Thread-safe.

    Attributes:
        agent: What it is connected through.
        config: The tier's configuration.
        instruments: Its counters.
    """

    def __init__(
        self,
        shared: Shared,
        config: PeerTierConfig,
        breaker: BreakerConfig,
        agent: Agent,
        *,
        is_own_agent: bool,
    ) -> None:
        """Take over an agent; `start` begins to talk.

        Raises:
            KvxError: The DRAM tier's memory cannot be registered.
        """
        self.agent = agent
        self.config = config
        self.instruments = PeerInstruments(shared.instruments.registry)
        self._shared = shared
        self._is_own_agent = is_own_agent
        self._registration = agent.register(shared.dram.region)
        self._talk = Talk(agent, shared.reactor, config, breaker, self.instruments)
        self._talk.when_answered = self._answered
        self._talk.when_lost = self._lost
        self._publisher = Publisher(
            shared.events, self._talk.say, shared.reactor.call_later, publish_s=config.publish_s
        )
        self._granting = Granting(
            shared,
            self._registration,
            self._talk.say,
            self.instruments,
            lent_bytes_max=config.max_in_flight_bytes,
        )
        self._asks: dict[int, LeaseAsk] = {}
        self._reads: weakref.WeakSet[PeerRead] = weakref.WeakSet()
        self._numbers = itertools.count(1)
        self._lock = threading.Lock()
        self._in_flight_bytes = 0

    def start(self) -> None:
        """Begin to listen, and meet who is connected already."""
        self._talk.start(self._publisher, self._granting)

    # What is known of peers.

    @property
    def sources(self) -> list[Source]:
        """The peers that were met, in their present lives."""
        return self._talk.sources

    @property
    def known_blocks(self) -> int:
        """Blocks that peers which may be asked are known to hold, once a tier and peer."""
        return sum(len(one.replica) for one in self.sources if not one.objection)

    @property
    def lent_bytes(self) -> int:
        """Bytes of ours that peers may read now."""
        return self._granting.lent_bytes

    @property
    def in_flight_bytes(self) -> int:
        """Bytes on their way from peers."""
        return self._in_flight_bytes

    @property
    def num_listeners(self) -> int:
        """Peers that are told what this cache holds."""
        return len(self._publisher)

    def stats(self) -> dict[str, object]:
        """Return numbers for people and tests; with each peer that is not asked, why."""
        return {
            "known_blocks": self.known_blocks,
            "in_flight_bytes": self.in_flight_bytes,
            "lent_bytes": self.lent_bytes,
            "listeners": self.num_listeners,
            "peers": {one.name: one.objection or "up" for one in self.sources},
        }

    def holds(self, keys: Keys) -> Mask:
        """Return which of (n, 16) uint8 keys some peer holds that may be asked, (n,) bool."""
        return self._held_by([one for one in self.sources if not one.objection], keys)

    def is_out_of_reach(self, keys: Keys) -> Mask:
        """Return which of (n, 16) uint8 keys only peers hold that cannot be asked, (n,) bool."""
        down = [one for one in self.sources if one.objection]
        if not down:
            return np.zeros(len(keys), np.bool_)
        return self._held_by(down, keys) & ~self.holds(keys)

    def expect(self, peer: str, keys: Keys) -> None:
        """Remember (n, 16) uint8 keys that a peer is said to hold, soon."""
        self._talk.soon(lambda: self._talk.expect(peer, keys))

    def choose(
        self, keys: Keys, block_bytes: int, is_open: Callable[[Source], Mask]
    ) -> list[tuple[Source, npt.NDArray[np.int64]]]:
        """Return whom to ask for which of (n, 16) uint8 keys: sources and places in `keys`.

        Args:
            keys: What is wanted.
            block_bytes: Size of each.
            is_open: Returns for which of the keys a source may be asked, (n,) bool.
        """
        sources = [one for one in self.sources if not one.objection and len(one.replica)]
        if not sources:
            return []
        candidates = [one.candidate(keys, is_open(one)) for one in sources]
        chosen = choose(candidates, len(keys), block_bytes)
        places = [np.flatnonzero(chosen == number) for number in range(len(sources))]
        return [(one, rows) for one, rows in zip(sources, places, strict=True) if len(rows)]

    # Fetching.

    def take_budget(self, num_blocks: int, block_bytes: int) -> int:
        """Return how many of the blocks may be on their way now, counted from here on."""
        with self._lock:
            room = (self.config.max_in_flight_bytes - self._in_flight_bytes) // block_bytes
            if self._in_flight_bytes == 0:
                room = max(room, 1)  # a block larger than the limit travels alone
            taken = max(0, min(num_blocks, room))
            self._in_flight_bytes += taken * block_bytes
            return taken

    def give_budget(self, num_blocks: int, block_bytes: int) -> None:
        """Note that blocks are not on their way any more."""
        with self._lock:
            self._in_flight_bytes -= num_blocks * block_bytes

    def new_ask(self, source: Source, num_blocks: int, remaining_s: float) -> LeaseAsk:
        """Return a question that `send` sends; its end is told to the reactor."""
        deadline_s = max(_DEADLINE_S_MIN, min(remaining_s, self.config.deadline_s))
        ask = LeaseAsk(
            next(self._numbers), source, num_blocks, deadline_s, self._ask_over,
            is_patient=remaining_s >= self.config.deadline_s,
        )  # fmt: skip
        self._asks[ask.number] = ask
        return ask

    def send(self, ask: LeaseAsk, keys: Keys, block_bytes: int) -> None:
        """Ask for (n, 16) uint8 keys."""
        remaining_s = max(_DEADLINE_S_MIN, ask.remaining_s)
        self._shared.reactor.call_later(remaining_s, ask.expire)
        question = Ask(ask.number, block_bytes, remaining_s, keys.tobytes())
        if not self._talk.is_open or not self._talk.try_say(ask.source.name, question):
            ask.lose()

    def read(
        self,
        ask: LeaseAsk,
        lease: RemoteLease,
        indices: npt.NDArray[np.int64],
        addresses: npt.NDArray[np.int64],
        block_bytes: int,
    ) -> PeerRead:
        """Begin to read blocks of a lease into DRAM slots.

        Args:
            ask: What was answered with the lease; its deadline holds for the read, too.
            lease: The lease.
            indices: (n,) numbers of its blocks.
            addresses: (n,) where they go.
            block_bytes: Size of each.

        Raises:
            KvxError: It cannot be begun.
        """
        offsets = addresses - self._registration.memory.address
        sizes = np.full(len(offsets), block_bytes, np.int64)
        if ask.remaining_s <= 0:
            raise TransferTimeout(f"{ask.source.name} answered too late")
        transfer = self.agent.read(
            self._registration.descriptors(offsets, sizes),
            ask.source.peer.blocks(indices, lease=lease),
            deadline_s=max(_DEADLINE_S_MIN, ask.remaining_s),
        )
        read = PeerRead(transfer, len(indices))
        with self._lock:
            self._reads.add(read)
        return read

    def release(self, ask: LeaseAsk, blocks_done: int, damaged: Keys | None = None) -> None:
        """Give a lease back, and name what did not match its checksum."""
        suspects = b"" if damaged is None else damaged[:SUSPECTS_MAX].tobytes()
        self._talk.try_say(ask.source.name, Release(ask.number, blocks_done, suspects))

    # The end.

    def stop(self, timeout_s: float) -> bool:
        """Serve and fetch no more; False when a peer was still reading when time was up."""
        end = time.monotonic() + timeout_s
        self._talk.stop()
        with self._lock:
            reads = list(self._reads)
        for ask in list(self._asks.values()):
            ask.cancel()
        for read in reads:
            read.cancel()
        stopped = threading.Event()

        def stop_granting() -> None:
            self._granting.stop()
            stopped.set()

        self._talk.soon(stop_granting)
        is_idle = stopped.wait(timeout_s)
        return is_idle and self._granting.wait_idle(max(0.0, end - time.monotonic()))

    def close(self, timeout_s: float) -> bool:
        """Let go of the agent and the memory; False when a transfer is still at that."""
        end = time.monotonic() + timeout_s
        self._talk.close()
        try:
            self._registration.close(timeout_s * _AGENT_SHARE)
        except KvxError as error:
            _log.warning("the DRAM tier's memory is still in use: %s", error)
            return False
        finally:
            if self._is_own_agent:
                self.agent.close(max(0.05, end - time.monotonic()))
        return True

    def _answered(self, peer: str, grant: Grant) -> bool:
        ask = self._asks.get(grant.number)
        return ask is not None and ask.source.name == peer and ask.answer(grant)

    def _lost(self, name: str) -> None:
        for ask in list(self._asks.values()):
            if ask.source.name == name and not ask.source.peer.state.is_connected:
                ask.lose()

    def _ask_over(self, ask: LeaseAsk) -> None:
        self._asks.pop(ask.number, None)
        self._shared.reactor.ended(ask.id)

    def _held_by(self, sources: list[Source], keys: Keys) -> Mask:
        held = np.zeros(len(keys), np.bool_)
        for source in sources:
            if len(source.replica):
                held |= source.holds(keys)
                if held.all():
                    break
        return held

"""This agent's end of NIXL: its memory, the peers it knows, and the words they exchange."""

from __future__ import annotations

import functools
import itertools
import logging
import secrets
import threading
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from kvx.errors import PeerLost, TransferTimeout, UnavailableError, UsageError
from kvx.transfer.backends.nixl import messages
from kvx.transfer.backends.nixl.bindings import NixlAgent
from kvx.transfer.backends.nixl.channel import NixlChannel
from kvx.transfer.backends.nixl.owner import Owner
from kvx.transfer.backends.nixl.pump import Pump, Verifier
from kvx.transfer.backends.nixl.registry import Registry
from kvx.transfer.codes import Code

if TYPE_CHECKING:
    from types import ModuleType

    from kvx.transfer.backend import BackendHost, Memory, PeerCard
    from kvx.transfer.backends.nixl.messages import Hello, Message, Region
    from kvx.transfer.backends.nixl.options import NixlOptions

_log = logging.getLogger(__name__)


def life_of(agent: str, incarnation: int) -> str:
    """Return what NIXL calls one life of an agent: a restarted one is somebody else."""
    return f"{agent}.{incarnation:016x}"


@dataclass(slots=True)
class _Peer:
    """A peer that has said hello, or was asked to.

    Attributes:
        hello: The last one.
        hellos: How many there were.
        channel: The way to it.
        overs: (life, transfer) whose end it could not be told.
    """

    hello: Hello | None = None
    hellos: int = 0
    channel: NixlChannel | None = None
    overs: list[tuple[str, int]] = field(default_factory=list)

    @property
    def life(self) -> str:
        """What it calls itself; empty before it has."""
        return "" if self.hello is None else self.hello.name


class NixlEndpoint:
    """See `kvx.transfer.backend.Endpoint`. Thread-safe."""

    def __init__(
        self, host: BackendHost, options: NixlOptions, bindings: ModuleType, version: str
    ) -> None:
        """Start NIXL and two threads.

        Raises:
            UnavailableError: A plugin does not start.
        """
        self.options = options
        self.life = life_of(host.agent, host.incarnation)
        self.nixl = NixlAgent(self.life, options, bindings)
        self.pump = Pump(f"kvx-nixl-{host.agent}")
        self.verifier = Verifier(f"kvx-nixl-verify-{host.agent}")
        self._host = host
        self._version = version
        # Not from 1: a peer may still hold leases for jobs of a previous life of ours.
        self._numbers = itertools.count(secrets.randbits(48) + 1)
        self._changed = threading.Condition()
        self._peers: dict[str, _Peer] = {}
        self._channels: list[NixlChannel] = []  # until nothing of them is left
        # What NIXL knows of peers changes under it, so that a life is not forgotten while used.
        self._introducing = threading.Lock()
        self._is_closed = False
        self._registry = Registry(self.nixl, self.life)
        self._owner = Owner(host, self._registry.get, self.send)
        host.on_message(self._received)
        host.on_lost(self._lost)

    def register(self, memory: Memory) -> None:
        """Let NIXL move this memory, and peers that are given leases on it.

        Raises:
            UnavailableError: No plugin takes it.
            CapacityError: There are too many regions.
        """
        self._registry.add(memory)
        with self._changed:
            known = [name for name, peer in self._peers.items() if peer.hello is not None]
        for name in known:
            self._try_hello(name)

    def unregister(self, memory: Memory, timeout_s: float) -> bool:
        """Take memory back; False while we or a peer may touch it: it must not be freed then."""
        end = time.monotonic() + timeout_s
        for name in self._registry.begin_leaving(memory.region):
            self._try_send(name, messages.Forget(memory.region))
        with self._changed:
            channels = list(self._channels)
        for channel in channels:
            channel.drop_plans(memory)
            for job in channel.uses(memory):
                if not job.wait_quiesced(max(0.0, end - time.monotonic())):
                    return False
        return self._registry.remove(memory.region, max(0.0, end - time.monotonic()))

    def card(self) -> bytes:
        """Return what peers must know to judge whether they can reach us this way."""
        plugins = list(self.options.backends)
        return messages.encode(messages.Card(messages.VERSION, self._version, plugins))

    def assess(self, peer: PeerCard) -> str:
        """Return why a peer cannot be reached through NIXL; empty when it can."""
        if peer.card is None:
            return f"{peer.name} has no NIXL"
        try:
            card = messages.decode_card(peer.card)
        except UsageError as error:
            return str(error)
        if card.version != messages.VERSION:
            return f"{peer.name} speaks version {card.version} of this, not {messages.VERSION}"
        if _minor(card.nixl) != _minor(self._version):
            return f"{peer.name} has NIXL {card.nixl}, this agent {self._version}"
        if not set(card.plugins) & set(self.options.backends):
            ours = ", ".join(self.options.backends)
            return f"{peer.name} has started {', '.join(card.plugins)}, this agent {ours}"
        return ""

    def connect(self, peer: PeerCard, timeout_s: float) -> NixlChannel:
        """Return the way to a peer. Not to be called on the thread that delivers messages.

        Raises:
            UnavailableError: NIXL does not reach it.
            TransferTimeout: It does not answer.
            PeerLost: There is no connection to ask over.
        """
        life = life_of(peer.name, peer.incarnation)
        with self._changed:
            if self._is_closed:
                raise UnavailableError("this agent's NIXL endpoint is closed")
            known = self._peers.setdefault(peer.name, _Peer())
            channel, hellos = known.channel, known.hellos
        if channel is not None and channel.life == life and channel.is_up():
            return channel
        if channel is not None:
            channel.lose(f"{peer.name} was connected anew")
        self._hello(peer.name, life, wants_answer=True)
        with self._changed:
            if not self._changed.wait_for(lambda: known.hellos > hellos, timeout_s):
                raise TransferTimeout(
                    f"the NIXL endpoint of {peer.name} did not answer within {timeout_s:g} s",
                    peer=peer.name,
                )
            hello = known.hello
        assert hello is not None, "a hello that was counted is kept"
        if hello.name != life:
            raise UnavailableError(f"{peer.name} calls itself {hello.name}, not {life}")
        channel = self._introduce(peer.name, hello)
        with self._changed:
            known.channel = channel
            overs, known.overs = known.overs, []
        for its_life, job in overs:
            if its_life == life:
                self.say_over(peer.name, its_life, job)
        return channel

    def close(self, timeout_s: float) -> None:
        """Cancel everything and stop; what NIXL is not through with keeps its memory alive."""
        end = time.monotonic() + timeout_s
        with self._changed:
            if self._is_closed:
                return
            self._is_closed = True
            channels = list(self._channels)
        for channel in channels:
            channel.close(0.0, Code.CANCELLED)
        is_free = self.pump.wait_idle(timeout_s)
        for memory in self._registry.all():
            is_free &= self.unregister(memory, max(0.0, end - time.monotonic()))
        if not is_free:
            _log.warning("NIXL may touch memory of %s yet: it is kept while we run", self.life)
            self.pump.keep(self)
            return
        self.pump.stop()
        self.verifier.stop()
        self.nixl.stop()

    def quarantine(self) -> list[int]:
        """Return the jobs that have ended while NIXL may still touch their memory."""
        with self._changed:
            channels = list(self._channels)
        return [job for channel in channels for job in channel.quarantine()]

    def held_writes(self) -> int:
        """Return how many writes of peers hold leases of ours."""
        return self._owner.held()

    # What follows is for channels.

    def next_job(self) -> int:
        """Return a number for a job."""
        return next(self._numbers)

    def ended(self, job: int) -> None:
        """Tell the agent of the end of a watched job."""
        self._host.ended(job)

    def send(self, peer: str, message: Message) -> None:
        """Send to a peer's endpoint; PeerLost when there is no connection."""
        self._host.send(peer, messages.encode(message))

    def say_over(self, peer: str, life: str, job: int) -> None:
        """Tell a peer that a transfer has ended, now or when it is connected again."""
        try:
            self.send(peer, messages.Over(job))
        except PeerLost:
            with self._changed:
                self._peers.setdefault(peer, _Peer()).overs.append((life, job))

    def ask_regions(self, peer: str, life: str) -> None:
        """Ask a peer what it has registered; PeerLost when there is no connection."""
        self._hello(peer, life, wants_answer=True)

    def maybe_forgotten(self, peer: str, region: int) -> None:
        """Tell a peer that it may have a region back, if no transfer touches it any more."""
        if not any(channel.touches(region) for channel in self._channels_to(peer)):
            self._try_send(peer, messages.Forgotten(region))

    def is_registered(self, memory: Memory) -> bool:
        """Return whether memory of ours is registered."""
        return self._registry.get(memory.region) is not None

    def retired(self, channel: NixlChannel) -> None:
        """Let NIXL forget a life of a peer, once nothing of any channel to it is left."""
        with self._introducing:
            with self._changed:
                if channel not in self._channels:
                    return
                self._channels.remove(channel)
                is_in_use = any(one.life == channel.life for one in self._channels)
            if not is_in_use:
                self.nixl.forget_peer(channel.life)

    def _introduce(self, peer: str, hello: Hello) -> NixlChannel:
        """Make NIXL know a peer, and a channel to it."""
        with self._introducing:
            self._learn(hello)
            self.nixl.connect(hello.name)
            channel = NixlChannel(peer, hello.name, _by_number(hello.regions), self)
            with self._changed:
                self._channels.append(channel)
        return channel

    def _learn(self, hello: Hello) -> None:
        name = self.nixl.load_peer(hello.metadata)
        if name != hello.name:
            raise UnavailableError(f"{hello.name} sent what NIXL takes for {name}")

    def _hello(self, peer: str, life: str, *, wants_answer: bool) -> None:
        self.send(peer, self._registry.hello(peer, life, wants_answer=wants_answer))

    def _try_send(self, peer: str, message: Message) -> None:
        try:
            self.send(peer, message)
        except PeerLost:
            _log.debug("%s left before it could be told", peer)

    def _try_hello(self, peer: str) -> None:
        life = self._life_of(peer)
        self._try_send(peer, self._registry.hello(peer, life, wants_answer=False))

    def _received(self, peer: str, payload: bytes) -> None:
        """Take a message; on the agent's thread, so nothing here waits."""
        try:
            message = messages.decode(payload)
        except UsageError as error:
            _log.warning("%s sent %s", peer, error)
            return
        life, put = self._life_of(peer), self.verifier.put
        match message:
            case messages.Begin():
                self._owner.begin(peer, life, message)
            case messages.Check():
                put(functools.partial(self._owner.check, peer, life, message))
            case messages.Finish():  # behind its checks
                put(functools.partial(self._owner.finish, peer, message))
            case messages.Over():
                put(functools.partial(self._owner.over, peer, message.job))
            case _:
                self._heard(peer, message)

    def _heard(self, peer: str, message: Message) -> None:
        """Take what is not about our memory under a transfer of the peer."""
        match message:
            case messages.Hello():
                self._greeted(peer, message)
            case messages.Forgotten():
                self._registry.forgotten(peer, message.region)
            case messages.Forget():
                self._forget(peer, message.region)
            case messages.Answer():
                for channel in self._channels_to(peer):
                    channel.answered(message)

    def _greeted(self, peer: str, hello: Hello) -> None:
        with self._changed:
            known = self._peers.setdefault(peer, _Peer())
            known.hello = hello
            known.hellos += 1
            channel = known.channel
            self._changed.notify_all()
        if hello.wants_answer:
            self._try_hello(peer)
        if channel is not None and channel.is_up() and channel.life == hello.name:
            try:
                self._learn(hello)
            except UnavailableError as error:
                _log.warning("%s: %s", peer, error)
                return
            channel.knows(_by_number(hello.regions))

    def _forget(self, peer: str, region: int) -> None:
        for channel in self._channels_to(peer):
            channel.forget(region)
        self.maybe_forgotten(peer, region)

    def _lost(self, peer: str, incarnation: int, has_ended: bool) -> None:  # noqa: FBT001 - a callback
        life = life_of(peer, incarnation)
        for channel in self._channels_to(peer):
            if channel.life == life:
                channel.lose("its agent is gone" if has_ended else "its agent cannot be reached")
        if has_ended:
            self._owner.buried(life)
            self._registry.buried(life)

    def _channels_to(self, peer: str) -> list[NixlChannel]:
        with self._changed:
            return [channel for channel in self._channels if channel.peer == peer]

    def _life_of(self, peer: str) -> str:
        with self._changed:
            known = self._peers.get(peer)
            return "" if known is None else known.life


def _by_number(regions: list[Region]) -> dict[int, Region]:
    return {region.number: region for region in regions}


def _minor(version: str) -> list[str]:
    return version.split(".")[:2]

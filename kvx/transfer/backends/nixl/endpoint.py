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
from kvx.transfer.backends.nixl.lives import Lives, life_of
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
# Whoever could not be told to forget a region is told again, in case it is back.
_FORGET_EVERY_S = 0.25


@dataclass(slots=True)
class _Peer:
    """A peer that has asked, or was asked.

    Attributes:
        life: That has asked, and is told of what we register; empty for none.
        hello: Its last one.
        hellos: How many there were.
        channel: The way to it.
        overs: (life, transfer) whose end it could not be told.
    """

    life: str = ""
    hello: Hello | None = None
    hellos: int = 0
    channel: NixlChannel | None = None
    overs: list[tuple[str, int]] = field(default_factory=list)


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
        self.verifier = Verifier(f"kvx-nixl-verify-{host.agent}")
        self._host = host
        self._version = version
        # Not from 1: a peer may still hold leases for jobs of a previous life of ours.
        self._numbers = itertools.count(secrets.randbits(48) + 1)
        self._changed = threading.Condition()
        self._peers: dict[str, _Peer] = {}
        self._channels: list[NixlChannel] = []  # until nothing of them is left
        self._is_closed = False
        self._registry = Registry(self.nixl, self.life)
        self._owner = Owner(host, self._registry.get, self.send)
        self._lives = Lives(
            self.nixl, self.life, registry=self._registry, owner=self._owner,
            verifier=self.verifier, is_in_use=self._is_in_use,
        )  # fmt: skip
        self.pump = Pump(f"kvx-nixl-{host.agent}", self._lives.hear)
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
            asking = [name for name, peer in self._peers.items() if peer.life]
        for name in asking:
            self._try_hello(name)

    def unregister(self, memory: Memory, timeout_s: float) -> bool:
        """Take memory back; False while we or a peer may touch it: it must not be freed then."""
        end = time.monotonic() + timeout_s
        self._ask_to_forget(memory)
        with self._changed:
            channels = list(self._channels)
        for channel in channels:
            channel.drop_plans(memory)
            for job in channel.uses(memory):
                if not job.wait_quiesced(max(0.0, end - time.monotonic())):
                    return False
        left_s = max(0.0, end - time.monotonic())
        while not self._registry.remove(memory.region, min(left_s, _FORGET_EVERY_S)):
            left_s = max(0.0, end - time.monotonic())
            if not left_s:
                return False
            self._ask_to_forget(memory)
        return True

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
        self.send(peer.name, messages.Ask(self.life))
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
        channel = NixlChannel(peer.name, life, _by_number(hello.regions), self)
        self._lives.meet(hello, functools.partial(self._use, channel))
        with self._changed:
            known.channel = channel
            overs, known.overs = known.overs, []
        for its_life, job in overs:
            if its_life == life:
                self.say_over(peer.name, its_life, job)
        return channel

    def close(self, timeout_s: float) -> None:
        """Cancel everything and stop; what NIXL is not through with keeps its memory alive."""
        with self._changed:
            if self._is_closed:
                return
            self._is_closed = True
            channels = list(self._channels)
        self._lives.close()
        for channel in channels:
            channel.close(0.0, Code.CANCELLED)
        self.pump.stop(self._end)
        if not self.pump.wait_ended(timeout_s):
            _log.warning("NIXL may touch memory of %s yet: it is kept until then", self.life)

    def quarantine(self) -> list[tuple[int, str, bool, int, float]]:
        """Return what has ended while NIXL may still touch its memory; see `Quarantining`."""
        with self._changed:
            channels = list(self._channels)
        return [one for channel in channels for one in channel.quarantine()]

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
        """Tell a peer that a transfer has ended: over NIXL, and again later, when need be."""
        try:
            self.send(peer, messages.Over(job))
        except PeerLost:
            self._lives.whisper(life, messages.Over(job))
            with self._changed:
                self._peers.setdefault(peer, _Peer()).overs.append((life, job))

    def ask_regions(self, peer: str) -> None:
        """Ask a peer what it has registered; PeerLost when there is no connection."""
        self.send(peer, messages.Ask(self.life))

    def maybe_forgotten(self, peer: str, region: int) -> None:
        """Tell a peer that it may have a region back, if no transfer touches it any more."""
        if not any(channel.touches(region) for channel in self._channels_to(peer)):
            self._try_send(peer, messages.Forgotten(region))

    def is_registered(self, memory: Memory) -> bool:
        """Return whether memory of ours is registered."""
        return self._registry.get(memory.region) is not None

    def retired(self, channel: NixlChannel) -> None:
        """Forget a channel that is down and of which nothing is left."""
        with self._changed:
            if channel in self._channels:
                self._channels.remove(channel)
        self._lives.part(channel.life)

    def _end(self) -> None:
        """End NIXL: nothing of ours is under way, and no peer writes; on the pump's thread.

        Peers that read fail at that: their memory is theirs, and we confirm nothing any more.
        """
        self._registry.clear()
        self.verifier.stop()
        self.nixl.stop()

    def _use(self, channel: NixlChannel) -> None:
        with self._changed:
            self._channels.append(channel)

    def _is_in_use(self, life: str) -> bool:
        with self._changed:
            return any(channel.life == life for channel in self._channels)

    def _ask_to_forget(self, memory: Memory) -> None:
        for name in self._registry.begin_leaving(memory.region):
            self._try_send(name, messages.Forget(memory.region))

    def _try_send(self, peer: str, message: Message) -> None:
        try:
            self.send(peer, message)
        except PeerLost:
            _log.debug("%s left before it could be told", peer)

    def _try_hello(self, peer: str) -> None:
        life = self._life_of(peer)
        hello, news = self._registry.hello(peer, life)
        try:
            self.send(peer, hello)
        except PeerLost:
            self._registry.untold(peer, life, news)  # it asks again when it is back

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
                put(functools.partial(self._owner.finish, peer, life, message))
            case messages.Over():
                put(functools.partial(self._owner.over, peer, message.job))
            case _:
                self._heard(peer, message)

    def _heard(self, peer: str, message: Message) -> None:
        """Take what is not about our memory under a transfer of the peer."""
        match message:
            case messages.Ask():
                self._asked(peer, message.name)
            case messages.Hello():
                self._greeted(peer, message)
            case messages.Forgotten():
                self._registry.forgotten(peer, message.region)
            case messages.Forget():
                self._forget(peer, message.region)
            case messages.Answer():
                for channel in self._channels_to(peer):
                    channel.answered(message)

    def _asked(self, peer: str, life: str) -> None:
        self._lives.back(life)
        with self._changed:
            self._peers.setdefault(peer, _Peer()).life = life
        self._try_hello(peer)

    def _greeted(self, peer: str, hello: Hello) -> None:
        self._lives.back(hello.name)
        with self._changed:
            known = self._peers.setdefault(peer, _Peer())
            known.hello = hello
            known.hellos += 1
            channel = known.channel
            self._changed.notify_all()
        if channel is not None and channel.is_up() and channel.life == hello.name:
            try:
                self._lives.learn(hello)
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
        with self._changed:
            known = self._peers.get(peer)
            if has_ended and known is not None and known.life == life:
                known.life = ""
        self._lives.lost(life, has_ended=has_ended)
        self.pump.wake()  # it listens from now on

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

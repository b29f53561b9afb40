"""The endpoint of a process: registers memory, leases it, and reads and writes that of peers."""

from __future__ import annotations

import weakref
from dataclasses import dataclass
from typing import TYPE_CHECKING, Self

from kvx.errors import PeerLost, UsageError
from kvx.transfer.agents.config import AgentConfig, TlsFiles
from kvx.transfer.agents.identity import new_identity
from kvx.transfer.agents.joining import import_card, join, seek
from kvx.transfer.agents.key import SharedKey, as_key
from kvx.transfer.agents.native import NativeMaker
from kvx.transfer.agents.parts import AgentCloseReport, assemble
from kvx.transfer.agents.peer import Peer, RemoteBlocks
from kvx.transfer.agents.prepared import PreparedTransfer
from kvx.transfer.agents.registration import Descriptors, Registration, register

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence
    from types import TracebackType

    from kvx.metrics import Registry
    from kvx.transfer.agents.loop import Notification
    from kvx.transfer.agents.metadata import PeerInfo
    from kvx.transfer.agents.peer_state import PeerEvent
    from kvx.transfer.agents.transfers import LinkTransfer
    from kvx.transfer.core import CoreMaker
    from kvx.transfer.route import Explanation


@dataclass(frozen=True, slots=True)
class Quarantined:
    """A transfer that has ended although somebody may still be at its memory.

    Attributes:
        id: Number of its job.
        peer: Name of the other side.
        is_write: Whether it is a write: then it is the peer that may still be at its own memory.
        size_bytes: Bytes of the transfer.
        since_s: Seconds since it ended.
    """

    id: int
    peer: str
    is_write: bool
    size_bytes: int
    since_s: float


class Agent:
    """Moves registered memory from and to peers. Thread-safe.

        with kvx.Agent("decode-0", key=key) as agent:
            registration = agent.register(buffer)
            peer = agent.connect("tcp://prefill-0:7000")
            agent.read(registration.blocks([0, 1]), peer.blocks([4, 7], lease=token)).wait()

    Only the owner of memory ever writes it: a read is received or copied by the agent that reads, a
    write by the peer that is written to. So no peer can write late into memory of this process.

    Attributes:
        name: What peers call it.
        config: How it behaves.
    """

    def __init__(
        self,
        name: str,
        *,
        listen: str | Sequence[str] | None = None,
        key: bytes | str | SharedKey | None = None,
        tls: TlsFiles | None = None,
        config: AgentConfig | Mapping[str, object] | None = None,
        maker: CoreMaker | None = None,
    ) -> None:
        """Open an endpoint, and listen.

        Args:
            name: Letters, digits, ``.``, ``_``, ``-``; each agent has its own.
            listen: Addresses such as ``tcp://0.0.0.0:7000`` (port 0 takes a free one) and
                ``unix:/path``; a socket file for this host is listened on besides.
            key: Secret that all agents share, 16 bytes or more; needed beyond this host.
            tls: Certificates for connections over TCP.
            config: An `AgentConfig`, or a mapping for one.
            maker: Makes native cores; for tests.

        Raises:
            UsageError: An argument is wrong, such as an address beyond this host without a key.
            UnavailableError: An address cannot be listened on, or there is no libssl for `tls`.
        """
        self.name = name
        self.config = AgentConfig.load(config)
        self._parts = assemble(
            new_identity(name),
            self.config,
            NativeMaker() if maker is None else maker,
            listen=listen,
            key=as_key(key),
            tls=tls,
        )
        self._finalizer = weakref.finalize(self, self._parts.forget)
        self._parts.loop.start()

    @property
    def incarnation(self) -> int:
        """Number of this life of the agent; another one after each start."""
        return self._parts.identity.incarnation

    @property
    def addresses(self) -> tuple[str, ...]:
        """Where others reach it."""
        return self._parts.listeners.told()

    @property
    def key(self) -> SharedKey | None:
        """The secret that all agents share, to sign by; None without one."""
        return self._parts.key

    @property
    def metrics(self) -> Registry:
        """The metrics; `agent.metrics.render()` is the Prometheus text."""
        return self._parts.instruments.registry

    def register(self, memory: object) -> Registration:
        """Let transfers touch memory, and keep it alive until the registration is closed.

        Args:
            memory: A `kvx.MemoryRegion` (one made with `is_shared` is mapped by peers on this
                host), a NumPy array, a tensor, or anything with DLPack or the buffer protocol;
                without gaps.

        Raises:
            UsageError: It is none of these, or no backend takes its kind.
        """
        self._check_open()
        return register(self._parts, self, memory)

    def deregister(self, registration: Registration, timeout_s: float = 10.0) -> None:
        """See `Registration.close`."""
        registration.close(timeout_s)

    def export(self) -> bytes:
        """Return the card of this agent: what another one needs to connect, signed with the key."""
        self._check_open()
        with self._parts.roster.changed:
            return self._parts.issuer.data

    def import_peer(self, card: bytes) -> PeerInfo:
        """Take the card of another agent, to `connect` by its name.

        Raises:
            UsageError: It is malformed, an old one, or our own.
            IncompatibleError: Another version, or not signed with our key.
        """
        self._check_open()
        return import_card(self._parts, card)

    def connect(self, target: str | bytes, timeout_s: float | None = None) -> Peer:
        """Be connected with a peer, now and, until `Peer.close`, after every loss.

        Blocks; a peer that is still starting is waited for.

        Args:
            target: An address, the card of a peer, or the name of one whose card is known.
            timeout_s: None for the configured time.

        Raises:
            TransferTimeout: It could not be reached in time; says what happened last.
            IncompatibleError: One side refused: another key, version or name.
        """
        self._check_open()
        limit = self.config.connect_s if timeout_s is None else timeout_s
        return Peer(self._parts, self, join(self._parts, target, limit))

    @property
    def peers(self) -> dict[str, Peer]:
        """The agents that were met, by name, each in its present life."""
        return {record.name: Peer(self._parts, self, record) for record in self._parts.roster.all()}

    def known(self) -> list[str]:
        """Return the names of the agents whose cards are known."""
        with self._parts.roster.changed:
            return self._parts.book.names()

    def read(
        self,
        local: Descriptors,
        remote: RemoteBlocks,
        *,
        deadline_s: float | None = None,
        backend: str | None = None,
        notify: bytes = b"",
    ) -> LinkTransfer:
        """Read leased blocks of a peer into registered memory; returns at once.

        A block counts only once it was verified. What a block that did not arrive leaves in its
        place is of no meaning.

        Args:
            local: n blocks to read into; of other shapes, if of the same sizes.
            remote: n blocks.
            deadline_s: Seconds until the transfer ends whatever happens; None for the default.
            backend: The only way to take; None for the best one that is possible.
            notify: Told to the peer once all has arrived, and only then; at most 64 KiB.

        Raises:
            UsageError: The arguments do not fit each other; nothing was done.
            PeerLost: The peer is not connected.
            StaleReference: The lease is of a former life of the peer.
            UnavailableError: No way to the peer is possible.
        """
        return self.prepare(local, remote).read(
            deadline_s=deadline_s, backend=backend, notify=notify
        )

    def write(
        self,
        local: Descriptors,
        remote: RemoteBlocks,
        *,
        deadline_s: float | None = None,
        backend: str | None = None,
        notify: bytes = b"",
    ) -> LinkTransfer:
        """Write registered memory to leased blocks of a peer; returns at once.

        Args:
            local: n blocks; must not change until the transfer has quiesced.
            remote: n blocks that were leased to be written.
            deadline_s: As `read`.
            backend: As `read`.
            notify: As `read`.

        Raises:
            KvxError: As `read`.
        """
        return self.prepare(local, remote).write(
            deadline_s=deadline_s, backend=backend, notify=notify
        )

    def prepare(self, local: Descriptors, remote: RemoteBlocks) -> PreparedTransfer:
        """Check both sides once, to read or write them often.

        Raises:
            UsageError: They do not fit each other.
        """
        self._check_open()
        return PreparedTransfer(self._parts, local, remote)

    def notify(self, peer: Peer, payload: bytes) -> None:
        """Send a peer a notification of at most 64 KiB; it finds it in `notifications`.

        Raises:
            PeerLost: There is no connection.
            UsageError: It is too large.
        """
        with self._parts.roster.changed:
            lane = peer.record.messenger()
        if lane is None:
            raise PeerLost(f"there is no connection to {peer.name}", peer=peer.name)
        self._parts.core.send_note(lane.connection, bytes(payload))

    def notifications(self, timeout_s: float = 0.0) -> list[Notification]:
        """Take the notifications that have come; waits for the first one, `timeout_s` at most."""
        return self._parts.notes.take(timeout_s)

    def iter_notifications(self) -> Iterator[Notification]:
        """Yield notifications as they come, until the agent is closed."""
        return iter(self._parts.notes)

    def on_event(self, callback: Callable[[PeerEvent], None]) -> Callable[[], None]:
        """Have a callback called with every `PeerUp`, `PeerDown`, `PeerChanged`, `PeerRestarted`.

        It is called on the agent's thread, which everything waits for: be quick.

        Returns:
            A function that ends it.
        """
        callbacks = self._parts.loop.callbacks
        callbacks.append(callback)

        def end() -> None:
            if callback in callbacks:
                callbacks.remove(callback)

        return end

    def seek(self, target: str) -> None:
        """Be connected with a peer from now on, whenever it can be reached; returns at once.

        Args:
            target: Its address, or its name: then it is dialled once its card is known.

        Raises:
            UsageError: It is a malformed address.
        """
        self._check_open()
        seek(self._parts, target)

    def say(self, peer: str, topic: str, payload: bytes) -> None:
        """Send a control message to whoever hears a topic at a peer; nobody may.

        For what is built on agents. Unlike notifications these are not kept for anybody.

        Args:
            peer: Its name.
            topic: At most 32 characters, with a dot in it: the others are those of backends.
            payload: At most 1 MiB.

        Raises:
            PeerLost: There is no connection.
            CapacityError: The peer takes nothing at the moment.
        """
        with self._parts.roster.changed:
            self._parts.say(topic, peer, payload)

    def hear(self, topic: str, taker: Callable[[str, bytes], None] | None) -> None:
        """Have a taker called with (peer's name, payload) of what is said to a topic; None ends it.

        It is called on the agent's thread, which everything waits for: be quick.
        """
        if taker is None:
            self._parts.loop.word_takers.pop(topic, None)
        else:
            self._parts.loop.word_takers[topic] = taker

    def events(self, timeout_s: float = 0.0) -> list[PeerEvent]:
        """Take the peer events that have come; waits for the first one, `timeout_s` at most."""
        return self._parts.events.take(timeout_s)

    def iter_events(self) -> Iterator[PeerEvent]:
        """Yield peer events as they come, until the agent is closed."""
        return iter(self._parts.events)

    def explain(self, peer: Peer | str) -> Explanation:
        """Return which way transfers with a peer take, and why not another one; `print` it."""
        name = peer if isinstance(peer, str) else peer.name
        with self._parts.roster.changed:
            record = self._parts.roster.current(name) if isinstance(peer, str) else peer.record
            if record is None:
                raise UsageError(f"{name!r} is no peer; met were {', '.join(self.peers) or 'none'}")
            return self._parts.ways.explain(record)

    @property
    def quarantine(self) -> list[Quarantined]:
        """Transfers that have ended although somebody may still be at their memory."""
        found = []
        for number, peer, is_write, size_bytes, since_s in self._parts.core.quarantine():
            record = self._parts.roster.by_number(peer)
            name = f"peer {peer}" if record is None else record.name
            found.append(Quarantined(number, name, is_write, size_bytes, since_s))
        return found + [Quarantined(*one) for one in self._parts.ways.quarantine()]

    def stats(self) -> dict[str, int]:
        """Return the counters of the native core: for people and tests."""
        return dict(self._parts.core.stats())

    def close(self, timeout_s: float = 10.0) -> AgentCloseReport:
        """Let transfers end, cancel the others, and close; calling it twice does no harm.

        Args:
            timeout_s: Seconds to spend at most.
        """
        self._finalizer.detach()
        return self._parts.close(timeout_s)

    def __enter__(self) -> Self:
        """Return the agent."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Close it."""
        self.close()

    def __repr__(self) -> str:
        """Return a text for people."""
        return f"Agent({self.name!r}, {len(self._parts.roster)} peers)"

    def _check_open(self) -> None:
        if not self._parts.is_open:
            raise UsageError(f"agent {self.name} is closed")

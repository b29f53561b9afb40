"""Configuration of an agent. The key is not in it: configurations are printed and logged."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from kvx.errors import ConfigError, UsageError
from kvx.records import Setting, decode, rejected, setting, validate
from kvx.transfer.agents.address import parse_address


def _names(source: object) -> tuple[str, ...]:
    if not isinstance(source, Sequence) or isinstance(source, str | bytes):
        raise ConfigError(f" is {source!r}, but a list of texts is needed")
    for place, one in enumerate(source):
        if not isinstance(one, str) or not one:
            raise rejected(f"[{place}]", one, "a text")
    return tuple(source)


def _addresses(source: object) -> tuple[str, ...]:
    found = _names(source)
    for place, one in enumerate(found):
        try:
            parse_address(one)
        except UsageError as error:
            raise rejected(f"[{place}]", one, "an address") from error
    return found


def _list(read: object) -> tuple[str, ...]:
    empty: tuple[str, ...] = ()
    return field(default=empty, metadata={"setting": Setting(decode=read)})  # type: ignore[arg-type]


@dataclass(frozen=True, slots=True)
class AgentConfig:
    """How an agent behaves; the defaults suit a machine with a few peers.

    Attributes:
        deadline_s: Seconds a transfer may take unless the call says otherwise.
        connect_s: Seconds `Agent.connect` tries, unless the call says otherwise.
        greeting_s: Seconds a connection may take to prove itself.
        ping_s: How long a connection may be silent before it is asked.
        suspect_after_s: Seconds without an answer after which a peer is FROZEN or HALF_OPEN.
        lost_after_s: Seconds without an answer after which its connections are dropped.
        connections: TCP connections to each peer.
        lease_ttl_s: Seconds a lease lasts unless the call says otherwise.
        backends: Ways that may be used; empty for all that are here.
        peers: Addresses of agents to be connected with at all times.
        directory: Shared directory in which agents find each other's cards; None for none.
        gossip: Whether cards of other agents are passed on and accepted.
        mesh: Whether every agent that is found is connected with, not only on demand.
        advertise: Addresses that others are told instead of those listened on.
        unix: Whether to listen on a socket file for peers on this machine.
        runtime_directory: Where that file lies; None for the user's own runtime directory.
        redial_s: Seconds until a lost peer is dialled again, at first; doubles up to
            `redial_max_s`.
        redial_max_s: Most seconds between two attempts.
        forget_after_s: Age at which a card that was only heard of is forgotten.
        peers_max: Most agents remembered.
        events_max: Most notifications and events kept for whoever reads them late.
        io_threads: Threads that send and receive.
        copy_threads: Threads that copy within this machine; 0 for one a CPU, at most 4.
        piece_bytes: Most bytes a piece of a stream has.
        cancel_grace_s: Seconds a cancelled write waits for the peer's word.
        verify_device: Whether blocks that were copied from device to device are read back into
            host memory and held against the checksums of their lease; slow.
    """

    deadline_s: float = setting(10.0, minimum=0.001)
    connect_s: float = setting(10.0, minimum=0.001)
    greeting_s: float = setting(5.0, minimum=0.01)
    ping_s: float = setting(1.0, minimum=0.01)
    suspect_after_s: float = setting(3.0, minimum=0.01)
    lost_after_s: float = setting(30.0, minimum=0.01)
    connections: int = setting(2, minimum=1, maximum=4)
    lease_ttl_s: float = setting(30.0, minimum=0.001, maximum=604_800)
    backends: tuple[str, ...] = _list(_names)
    peers: tuple[str, ...] = _list(_addresses)
    directory: Path | None = None
    gossip: bool = True
    mesh: bool = False
    advertise: tuple[str, ...] = _list(_addresses)
    unix: bool = True
    runtime_directory: Path | None = None
    redial_s: float = setting(0.2, minimum=0.001)
    redial_max_s: float = setting(5.0, minimum=0.001)
    forget_after_s: float = setting(600.0, minimum=1)
    peers_max: int = setting(1024, minimum=1)
    events_max: int = setting(4096, minimum=1)
    io_threads: int = setting(1, minimum=1, maximum=16)
    copy_threads: int = setting(0, minimum=0, maximum=256)
    piece_bytes: int = setting(1 << 20, minimum=4096, maximum=4 << 20)
    cancel_grace_s: float = setting(0.1, minimum=0)
    verify_device: bool = False

    def __post_init__(self) -> None:
        """Check every value, and that the times are in order."""
        validate(self)
        if not self.ping_s <= self.suspect_after_s <= self.lost_after_s:
            raise ConfigError(
                f"suspect_after_s = {self.suspect_after_s}: accepted is a time from ping_s "
                f"({self.ping_s}) to lost_after_s ({self.lost_after_s})",
                key="suspect_after_s",
            )

    @classmethod
    def load(cls, source: AgentConfig | Mapping[str, object] | None) -> AgentConfig:
        """Return the configuration that `source` describes.

        Raises:
            ConfigError: Unknown key or malformed value; names it and what is accepted.
        """
        return decode(cls, {} if source is None else source)


@dataclass(frozen=True, slots=True)
class TlsFiles:
    """Certificates for connections over TCP; TLS 1.3, and both sides present one.

    Attributes:
        certificate: PEM file, with its chain.
        private_key: PEM file.
        authority: PEM file of who signs the certificates of peers.
    """

    certificate: Path | str
    private_key: Path | str
    authority: Path | str

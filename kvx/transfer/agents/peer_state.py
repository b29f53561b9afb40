"""How a peer is doing, judged from the numbers of its connections; and what is told of it. Pure."""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from kvx.transfer.agents.config import AgentConfig


class PeerState(enum.StrEnum):
    """Where a peer stands.

    CONNECTING: being dialled, or proving itself. UP: it answers. FROZEN: its kernel takes what we
    send, but the process answers nothing. HALF_OPEN: what we send is not even acknowledged. LOST:
    no connection is left. FENCED: a later life of the agent has taken its place.
    """

    CONNECTING = "connecting"
    UP = "up"
    FROZEN = "frozen"
    HALF_OPEN = "half_open"
    LOST = "lost"
    FENCED = "fenced"

    @property
    def is_connected(self) -> bool:
        """Whether there is a connection that transfers could be begun on."""
        return self in (PeerState.UP, PeerState.FROZEN, PeerState.HALF_OPEN)


@dataclass(frozen=True, slots=True)
class Health:
    """The numbers of one connection.

    Attributes:
        heard_ago_s: Since anything was received.
        answered_ago_s: Since a ping was answered, or none was asked.
        unacknowledged: TCP segments that the other host has not confirmed.
        retransmits: Of the oldest of them.
    """

    heard_ago_s: float
    answered_ago_s: float
    unacknowledged: int = 0
    retransmits: int = 0

    @classmethod
    def of(cls, info: Mapping[str, object]) -> Health:
        """Return what `LinkCore.info` says of it."""
        return cls(
            float(info["heard_ago_s"]),  # type: ignore[arg-type]
            float(info["answered_ago_s"]),  # type: ignore[arg-type]
            int(info["unacknowledged"]),  # type: ignore[call-overload]
            int(info["retransmits"]),  # type: ignore[call-overload]
        )

    @property
    def silent_s(self) -> float:
        """Seconds without a sign of life that was due."""
        return min(self.heard_ago_s, self.answered_ago_s)


def judge(connections: Sequence[Health], config: AgentConfig, *, is_introduced: bool) -> PeerState:
    """Return the state of a peer.

    Args:
        connections: Those that are approved.
        config: Says when silence is suspicious.
        is_introduced: Whether its card has come.
    """
    if not connections:
        return PeerState.LOST
    silent_s = min(health.silent_s for health in connections)
    if silent_s >= config.lost_after_s:
        return PeerState.LOST
    if not is_introduced:
        return PeerState.CONNECTING
    if silent_s < config.suspect_after_s:
        return PeerState.UP
    # A frozen process still acknowledges: its kernel does. Only a dead host or cut line does not.
    if any(health.unacknowledged and health.retransmits for health in connections):
        return PeerState.HALF_OPEN
    return PeerState.FROZEN


def is_overdue(health: Health, config: AgentConfig) -> bool:
    """Return whether a connection has been silent for so long that it is to be dropped."""
    return health.silent_s >= config.lost_after_s


@dataclass(frozen=True, slots=True)
class PeerUp:
    """A peer is connected and introduced."""

    name: str
    incarnation: int


@dataclass(frozen=True, slots=True)
class PeerDown:
    """A peer that was up is LOST or FENCED, and why."""

    name: str
    incarnation: int
    reason: str


@dataclass(frozen=True, slots=True)
class PeerChanged:
    """A peer went from one state to another."""

    name: str
    incarnation: int
    before: PeerState
    after: PeerState


@dataclass(frozen=True, slots=True)
class PeerRestarted:
    """A later life of a peer has taken the place of `former`, whose leases are void."""

    name: str
    incarnation: int
    former: int


PeerEvent = PeerUp | PeerDown | PeerChanged | PeerRestarted

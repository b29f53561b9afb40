"""The counters of one agent, under the names that `agent.metrics` renders."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvx.metrics import Registry
from kvx.transfer.agents.peer_state import PeerState

if TYPE_CHECKING:
    from collections.abc import Callable

    from kvx.errors import KvxError
    from kvx.transfer.agents.outcome import LinkResult
    from kvx.transfer.agents.roster import Roster
    from kvx.transfer.core import LinkCore

# What the native core counts, and how it is called for people.
_NATIVE = {
    "connections": "Connections, approved or not",
    "regions": "Registered regions",
    "region_bytes": "Their bytes",
    "leases": "Leases that are out",
    "lease_bytes": "Bytes leased",
    "running": "Transfers of this agent under way",
    "served": "Transfers of peers under way",
    "quarantined": "Transfers that ended and have not quiesced",
    "quarantined_bytes": "Their bytes",
    "bytes_served": "Bytes sent to peers that read",
    "corrupt_blocks": "Blocks whose bytes proved wrong",
    "stale_blocks": "Blocks whose lease had ended",
    "refused_requests": "Requests and connections that were refused",
    "malformed_frames": "Frames that were none",
    "late_pieces": "Pieces for transfers that had ended, thrown away",
    "dropped_events": "Events that nobody took in time",
}


class AgentInstruments:
    """What an agent counts. Thread-safe."""

    def __init__(self, core: LinkCore, roster: Roster) -> None:
        """Register everything under `kvx_agent_`."""
        self.registry = Registry()
        self._transfers = self.registry.counter(
            "kvx_agent_transfers_total", "Transfers by verb, backend and terminal state",
            ("verb", "backend", "state"),
        )  # fmt: skip
        self._bytes = self.registry.counter(
            "kvx_agent_bytes_total", "Bytes moved and verified, by verb and backend",
            ("verb", "backend"),
        )  # fmt: skip
        self._latency = self.registry.histogram(
            "kvx_agent_transfer_seconds", "Time from the call to the terminal state",
            ("verb", "backend"),
        )  # fmt: skip
        self._events = self.registry.counter(
            "kvx_agent_peer_events_total", "What happened to peers", ("event",)
        )
        self.registry.gauge(
            "kvx_agent_peers_up", "Peers that answer",
            lambda: sum(record.state is PeerState.UP for record in roster.all()),
        )  # fmt: skip
        for name, explanation in _NATIVE.items():
            self.registry.gauge(f"kvx_agent_{name}", explanation, _reader(core, name))

    def note_transfer(self, verb: str, result: LinkResult, error: KvxError | None) -> None:
        """Count a transfer that became terminal."""
        state = "done" if error is None else type(error).__name__
        self._transfers.add(1, (verb, result.backend, state))
        self._bytes.add(result.bytes_done, (verb, result.backend))
        self._latency.observe(result.elapsed_s, (verb, result.backend))

    def note_event(self, event: object) -> None:
        """Count something that happened to a peer."""
        self._events.add(1, (type(event).__name__,))


def _reader(core: LinkCore, name: str) -> Callable[[], float]:
    return lambda: core.stats().get(name, 0)

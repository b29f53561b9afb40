"""The backends of one agent: what is here, what each says of a peer, and which one is taken."""

from __future__ import annotations

import logging
from collections.abc import Callable
from importlib.metadata import entry_points
from typing import TYPE_CHECKING

from kvx.buffers import MemoryKind
from kvx.errors import KvxError, UnavailableError, UsageError
from kvx.transfer.backend import (
    CARD_BYTES_MAX,
    ENTRY_POINTS,
    Backend,
    BackendHost,
    Channel,
    DeviceEndpoint,
    Endpoint,
    LinkPlan,
    Memory,
    PeerCard,
    Quarantining,
    kinds_of,
)
from kvx.transfer.backends import cuda_ipc, cuda_staged, local, shm, tcp
from kvx.transfer.route import Candidate, Explanation, choose

if TYPE_CHECKING:
    from collections.abc import Sequence

    from kvx.transfer.agents.identity import HostIdentity
    from kvx.transfer.agents.roster import PeerRecord, Roster

_log = logging.getLogger(__name__)
_UNKNOWN_RANK = 1000
# What a peer registers is announced to us, which may be on its way behind the token that names it.
_NEWS_S = 0.25


def load_backends() -> tuple[list[Backend], dict[str, str]]:
    """Return the backends there are, and why others that are installed could not be loaded."""
    found: list[Backend] = [
        local.backend(), cuda_ipc.backend(), shm.backend(), cuda_staged.backend(),
        tcp.backend(),
    ]  # fmt: skip
    failures = {}
    for entry in entry_points(group=ENTRY_POINTS):
        try:
            found.append(entry.load()())
        except Exception as error:  # noqa: BLE001 - told by explain: it is somebody else's code
            failures[entry.name] = f"it cannot be loaded: {type(error).__name__}: {error}"
            _log.warning("backend %s cannot be loaded: %s", entry.name, error)
    return found, failures


class Ways:
    """The endpoints of one agent and the channels to its peers. Thread-safe.

    Attributes:
        failures: Why a backend is not here, by name.
    """

    def __init__(
        self,
        backends: Sequence[Backend],
        failures: dict[str, str],
        *,
        allowed: Sequence[str],
        here: HostIdentity,
        roster: Roster,
    ) -> None:
        """Know some backends; `open` makes their endpoints."""
        self._backends = {backend.name: backend for backend in backends}
        self._allowed = tuple(allowed)
        self._here = here
        self._changed = roster.changed
        self._endpoints: dict[str, Endpoint] = {}
        self._regions: dict[str, set[int]] = {}
        self._refusals: dict[tuple[str, int], str] = {}
        self._orders: dict[int, tuple[str, ...]] = {}
        self.failures = dict(failures)
        unknown = {*self._allowed} - {*self._backends} - {*failures}
        if unknown:
            raise UsageError(
                f"backends = {', '.join(sorted(unknown))}: unknown; here are "
                f"{', '.join(self._backends)}"
            )

    def open(self, host_of: Callable[[str], BackendHost]) -> None:
        """Open every backend that is allowed and here."""
        for name, backend in self._backends.items():
            if self._allowed and name not in self._allowed:
                continue
            try:
                missing = backend.availability()
                if missing:
                    self.failures[name] = missing
                else:
                    self._endpoints[name] = backend.open(host_of(name))
                    self._regions[name] = set()
            except Exception as error:  # noqa: BLE001 - told by explain, as above
                self.failures[name] = f"it cannot be opened: {type(error).__name__}: {error}"
                _log.warning("backend %s cannot be opened: %s", name, error)

    def cards(self) -> dict[str, bytes]:
        """Return what the endpoints want peers to know."""
        cards = {}
        for name, endpoint in self._endpoints.items():
            card = endpoint.card()
            if len(card) > CARD_BYTES_MAX:
                _log.warning("the card of backend %s has %d bytes: left out", name, len(card))
            else:
                cards[name] = card
        return cards

    def register(self, memory: Memory) -> None:
        """Offer memory to every endpoint that moves its kind.

        Raises:
            UsageError: None takes it.
        """
        objections = {}
        for name, endpoint in self._endpoints.items():
            if memory.kind not in kinds_of(self._backends[name]):
                objections[name] = f"moves no {memory.kind} memory"
                continue
            try:
                endpoint.register(memory)
                self._regions[name].add(memory.region)
            except KvxError as error:
                objections[name] = self._refusals[name, memory.region] = str(error)
        if not any(memory.region in regions for regions in self._regions.values()):
            objections |= self.failures
            told = "; ".join(f"{name}: {why}" for name, why in objections.items())
            wayout = (
                "; onboard into a host kvx.MemoryRegion and copy from there"
                if memory.kind is MemoryKind.DEVICE
                else ""
            )
            raise UsageError(f"no backend takes this {memory.kind} memory ({told}){wayout}")

    def unregister(self, memory: Memory, timeout_s: float) -> str:
        """Let endpoints forget memory; returns the name of one that still uses it, or nothing."""
        for name, endpoint in self._endpoints.items():
            if memory.region not in self._regions[name]:
                continue
            if not endpoint.unregister(memory, timeout_s):
                return name
            self._regions[name].discard(memory.region)
        for key in [key for key in self._refusals if key[1] == memory.region]:
            del self._refusals[key]
        return ""

    def device_endpoints(self, memory: Memory) -> list[DeviceEndpoint]:
        """Return the endpoints that have taken this memory and know its device."""
        return [
            endpoint
            for name, endpoint in self._endpoints.items()
            if memory.region in self._regions[name] and isinstance(endpoint, DeviceEndpoint)
        ]

    def quarantine(self) -> list[tuple[int, str, bool, int, float]]:
        """Return what has ended in the endpoints and not quiesced; see `Quarantining`."""
        found: list[tuple[int, str, bool, int, float]] = []
        for endpoint in self._endpoints.values():
            if isinstance(endpoint, Quarantining):
                found += endpoint.quarantine()
        return found

    def forget(self, record: PeerRecord) -> list[Channel]:
        """Forget what was found out about a peer; returns its channels, to be closed."""
        self._orders.pop(record.number, None)
        channels, record.channels = list(record.channels.values()), {}
        return channels

    def renew(self, record: PeerRecord) -> None:
        """Ask the endpoints about a peer again: its card has changed."""
        self._orders.pop(record.number, None)

    def explain(self, record: PeerRecord, forced: str | None = None) -> Explanation:
        """Return what every backend is for a peer."""
        with self._changed:
            candidates = [
                Candidate(name, backend.rank, self._assess(name, record))
                for name, backend in self._backends.items()
            ]
        candidates += [
            Candidate(name, _UNKNOWN_RANK, why)
            for name, why in self.failures.items()
            if name not in self._backends
        ]
        routes = choose(candidates, allowed=self._allowed, forced=forced)
        return Explanation(record.name, routes)

    def channel(
        self,
        record: PeerRecord,
        plan: LinkPlan,
        *,
        is_write: bool,
        forced: str | None,
        timeout_s: float,
    ) -> tuple[str, Channel]:
        """Return the best way for a plan, by name.

        Raises:
            UsageError: The forced backend does not exist.
            UnavailableError: No way is possible; says why of each.
        """
        if forced is not None and forced not in self._backends and forced not in self.failures:
            raise UsageError(f"backend = {forced!r}; here are {', '.join(self._backends)}")
        objections = {}
        for name in self._order(record):
            if forced is not None and forced != name:
                continue
            objection = self._objection(name, plan)
            if not objection:
                channel = self._connected(record, name, timeout_s)
                objection = _channel_objection(channel, plan, is_write, min(timeout_s, _NEWS_S))
                if not objection:
                    return name, channel
            objections[name] = objection
        told = [f"{name}: {why}" for name, why in objections.items()]
        raise UnavailableError(
            f"no way to {'write to' if is_write else 'read from'} {record.name}: "
            + ("; ".join(told) if told else str(self.explain(record, forced)))
        )

    def close(self, timeout_s: float) -> None:
        """Close every endpoint, and let go of it: nothing is open any more."""
        with self._changed:
            endpoints, self._endpoints = self._endpoints, {}
            self._orders.clear()
        for name, endpoint in endpoints.items():
            try:
                endpoint.close(timeout_s)
            except Exception:  # noqa: BLE001 - logged here: it is somebody else's code
                _log.exception("backend %s did not close", name)

    def _order(self, record: PeerRecord) -> tuple[str, ...]:
        """Return the backends that reach a peer, best first; found out once for each peer."""
        order = self._orders.get(record.number)
        if order is None:
            routes = self.explain(record).routes
            order = tuple(route.backend for route in routes if route.state != "not here")
            self._orders[record.number] = order
        return order

    def _objection(self, name: str, plan: LinkPlan) -> str:
        if plan.memory.region not in self._regions[name]:
            return self._refusals.get(
                (name, plan.memory.region), f"it has not taken this {plan.memory.kind} memory"
            )
        return ""

    def _connected(self, record: PeerRecord, name: str, timeout_s: float) -> Channel:
        channel = record.channels.get(name)
        if channel is None or not channel.is_up():
            with self._changed:
                card = self._peer_card(name, record)
                endpoint = self._endpoints.get(name)
            if endpoint is None:
                raise UnavailableError(f"{name} is not open any more: the agent is being closed")
            # Without the lock: connecting may take messages that the agent's thread has to bring.
            channel = endpoint.connect(card, timeout_s)
            record.channels[name] = channel
        return channel

    def _assess(self, name: str, record: PeerRecord) -> str:
        if name in self.failures:
            return self.failures[name]
        if name not in self._endpoints:
            return "it is not open"
        if not record.lanes:
            return f"{record.name} is {record.state.value}"
        return self._endpoints[name].assess(self._peer_card(name, record))

    def _peer_card(self, name: str, record: PeerRecord) -> PeerCard:
        card = record.card
        assert card is not None, "whoever is connected has shown its card"
        return PeerCard(
            name=record.name,
            incarnation=record.identity.incarnation,
            number=record.number,
            host=card.host,
            is_same_host=card.host.is_same_host(self._here),
            is_same_process=card.host.is_same_process(self._here),
            is_unix=any(lane.is_unix for lane in record.lanes.values()),
            card=card.backends.get(name),
        )


def _channel_objection(
    channel: Channel,
    plan: LinkPlan,
    is_write: bool,
    patience_s: float,  # noqa: FBT001
) -> str:
    # Asked for every transfer; isinstance() of a protocol takes longer than a small one does.
    objection: Callable[..., str] | None = getattr(channel, "objection", None)
    return "" if objection is None else objection(plan, is_write=is_write, patience_s=patience_s)

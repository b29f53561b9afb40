"""What all verbs of one cache stand on: its tiers, its engine, its names and its accounts."""

from __future__ import annotations

import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from kvx.cache.nvme import NvmePool
from kvx.cache.reasons import MissReason
from kvx.cache.refusals import Refusals
from kvx.cache.result import TierKind
from kvx.cache.sightings import Sightings
from kvx.namespace import public_id
from kvx_ext import _core

if TYPE_CHECKING:
    from collections.abc import Callable

    import numpy.typing as npt

    from kvx.cache.admission import Admission
    from kvx.cache.device import DeviceAccess
    from kvx.cache.dram import DramTier
    from kvx.cache.events import EventLog
    from kvx.cache.flusher import Flusher
    from kvx.cache.hbm import HbmTier
    from kvx.cache.instruments import Instruments
    from kvx.cache.nvme import NvmeTier
    from kvx.cache.peer.tier import PeerTier
    from kvx.cache.pool import Pool
    from kvx.cache.reactor import Reactor
    from kvx.cache.s3.tier import S3Tier

# What `BlockIndex.inspect` answers.
_HELD, _EXPIRED, _WRITING = 1, 2, 3


@dataclass(frozen=True, slots=True)
class NamespaceFacts:
    """What the records of blocks say about their namespaces; arrays over the blocks.

    Attributes:
        fingerprints: (n, 16) uint8.
        block_bytes: (n,) uint32.
        tenants: (n,) uint64 digest of the tenant's name.
    """

    fingerprints: npt.NDArray[np.uint8]
    block_bytes: npt.NDArray[np.uint32]
    tenants: npt.NDArray[np.uint64]


class NamespaceTable:
    """Numbers for namespaces and owners: what is stored beside slots instead of the values."""

    def __init__(self) -> None:
        """Start empty."""
        self._lock = threading.Lock()
        self._ids: dict[bytes, int] = {}
        self._fingerprints = np.zeros((0, 16), np.uint8)
        self._block_bytes = np.zeros(0, np.uint32)
        self._owners = np.zeros(0, np.int64)
        self._tenants = np.zeros(0, np.uint64)
        self._owner_ids: dict[int, int] = {}

    def owner_id(self, tenant_digest: int) -> int:
        """Return the number that a tenant's quota is kept under."""
        with self._lock:
            return self._owner_ids.setdefault(tenant_digest, len(self._owner_ids))

    def add(self, fingerprint: bytes, block_bytes: int, tenant_digest: int) -> int:
        """Return the number of a namespace, the same for the same fingerprint."""
        owner = self.owner_id(tenant_digest)
        with self._lock:
            known = self._ids.get(fingerprint)
            if known is not None:
                return known
            row = np.frombuffer(fingerprint, np.uint8)[None]
            self._fingerprints = np.concatenate([self._fingerprints, row])
            self._block_bytes = np.append(self._block_bytes, np.uint32(block_bytes))
            self._owners = np.append(self._owners, np.int64(owner))
            self._tenants = np.append(self._tenants, np.uint64(tenant_digest))
            self._ids[fingerprint] = len(self._ids)
            return len(self._ids) - 1

    def owners_of(self, ids: npt.NDArray[np.int32]) -> npt.NDArray[np.int64]:
        """Return the owners, (n,) int64, of namespaces given by number."""
        owners: npt.NDArray[np.int64] = self._owners[ids]
        return owners

    def describe(self, ids: npt.NDArray[np.int32]) -> NamespaceFacts:
        """Return what records say about namespaces given by number."""
        return NamespaceFacts(self._fingerprints[ids], self._block_bytes[ids], self._tenants[ids])

    def tenant_of(self, namespace_id: int) -> int:
        """Return the digest of the name of the tenant of a namespace given by number."""
        return int(self._tenants[namespace_id])

    def public_id(self, namespace_id: int) -> bytes:
        """Return the 16 bytes that name a namespace to others."""
        return public_id(self._fingerprints[namespace_id].tobytes())


@dataclass(slots=True)
class Shared:
    """The parts of one cache. Made by `TieredCache.open`; flusher and nvme come and go together."""

    engine: _core.Engine
    reactor: Reactor
    hbm: HbmTier | None
    dram: DramTier
    nvme: NvmeTier | None
    flusher: Flusher | None
    admission: Admission
    events: EventLog
    instruments: Instruments
    history: _core.MissHistory
    names: NamespaceTable
    sightings: Sightings
    refusals: Refusals
    clock: Callable[[], float]
    device: DeviceAccess
    peers: PeerTier | None = None
    s3: S3Tier | None = None

    def now_ms(self) -> int:
        """Return the wall clock in milliseconds, as the indexes want it."""
        return int(self.clock() * 1000)

    def note_stored(self, namespace_id: int, tier: TierKind, keys: npt.NDArray[np.uint8]) -> None:
        """Publish that a tier holds blocks now; belongs inside `events.changing`."""
        if len(keys):
            self.events.stored(keys, tier.name.lower(), self.names.public_id(namespace_id))

    def note_evicted(self, tier: TierKind, keys: npt.NDArray[np.uint8]) -> None:
        """Publish that a tier let blocks go to make room."""
        if len(keys):
            self.events.removed(keys, tier.name.lower(), MissReason.EVICTED)
            self.instruments.note_evicted(tier, len(keys))

    def drop_corrupt(self, pool: Pool, tier: TierKind, keys: npt.NDArray[np.uint8]) -> None:
        """Forget blocks whose bytes proved wrong, so that nobody is served them again."""
        self.instruments.note_corrupt(tier, len(keys))
        self.remove(pool, tier, keys, MissReason.CORRUPT)

    def remove(
        self, pool: Pool, tier: TierKind, keys: npt.NDArray[np.uint8], reason: MissReason
    ) -> int:
        """Forget blocks in one tier, for good; returns how many there were."""
        # Pinned, so that no slot is reused before its record is dead: killing it later would kill
        # the record of the block that took the slot.
        held = pool.find(keys, self.now_ms(), pin=True)
        if isinstance(pool, NvmePool) and self.nvme is not None:
            self.nvme.kill_records(pool, held.slots[held.mask])
        with self.events.changing():
            removed_keys, _ = pool.index.remove(keys, reason.history_code)
            if len(removed_keys):
                self.events.removed(removed_keys, tier.name.lower(), reason)
        pool.unpin(held)
        if isinstance(pool, NvmePool) and self.flusher is not None:
            self.flusher.write_records()
        return len(removed_keys)

    def explain(
        self,
        namespace_id: int,
        block_bytes: int,
        keys: npt.NDArray[np.uint8],
        hashes: npt.NDArray[np.uint8],
    ) -> npt.NDArray[np.uint8]:
        """Say why blocks are not served, (n,) uint8 of `MissReason`."""
        reasons = MissReason.of_history(self.history.why(keys))
        for _, pool in self.pools_of(block_bytes):
            condition = pool.index.inspect(keys, self.now_ms())
            reasons[condition == _EXPIRED] = MissReason.EXPIRED
            reasons[condition == _WRITING] = MissReason.IN_FLIGHT
        evicted = reasons == MissReason.EVICTED
        if evicted.any():
            refused = self.refusals.explain(keys[evicted])
            reasons[evicted] = np.where(refused == MissReason.HIT, MissReason.EVICTED, refused)
        unknown = reasons == MissReason.NEVER_STORED
        if unknown.any():
            reasons[unknown] = self.sightings.explain(hashes[unknown], namespace_id)
        if self.nvme is not None and not self.nvme.is_up():
            lower = self.nvme.pool_if_any(block_bytes)
            if lower is not None:
                held = lower.index.inspect(keys, self.now_ms()) == _HELD
                reasons[held] = MissReason.TIER_DOWN
        if self.peers is not None:
            reasons[self.peers.is_out_of_reach(keys)] = MissReason.TIER_DOWN
        if self.s3 is not None:
            reasons[self.s3.is_out_of_reach(keys)] = MissReason.TIER_DOWN
        return reasons

    def pools(self) -> list[tuple[TierKind, Pool]]:
        """Return every pool with its tier, the highest tier first."""
        tiers = ((TierKind.HBM, self.hbm), (TierKind.DRAM, self.dram), (TierKind.NVME, self.nvme))
        return [
            (kind, pool)
            for kind, tier in tiers
            if tier is not None
            for pool in list(tier.pools.values())
        ]

    def held_keys(self) -> dict[str, npt.NDArray[np.uint8]]:
        """Return the keys held by each tier, (n, 16) uint8, coldest first."""
        held: dict[str, list[npt.NDArray[np.uint8]]] = {}
        for tier, pool in self.pools():
            held.setdefault(tier.name.lower(), []).append(pool.index.snapshot()["keys"])
        return {tier: np.concatenate(keys) for tier, keys in held.items()}

    def pools_of(self, block_bytes: int) -> list[tuple[TierKind, Pool]]:
        """Return the pools that blocks of a size may be in, the highest tier first."""
        pools: list[tuple[TierKind, Pool]] = []
        if self.hbm is not None:
            pools.append((TierKind.HBM, self.hbm.pool_for(block_bytes)))
        pools.append((TierKind.DRAM, self.dram.pool_for(block_bytes)))
        lower = self.nvme.pool_if_any(block_bytes) if self.nvme is not None else None
        return pools if lower is None else [*pools, (TierKind.NVME, lower)]

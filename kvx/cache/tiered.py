"""The cache: tiers under one roof, opened from a configuration, closed with a bound.

Where it sits: `TieredCache` owns everything; `CacheSpace` (one namespace of it) has the verbs.
Nothing here is done per block.
"""

from __future__ import annotations

import collections
import time
import weakref
from typing import TYPE_CHECKING, Self

import numpy as np

from kvx.cache.assembly import FaultInjection, assemble, restore
from kvx.cache.reasons import MissReason
from kvx.cache.space import CacheSpace
from kvx.cache.upkeep import Upkeep
from kvx.config import CacheConfig
from kvx.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import TracebackType

    import numpy.typing as npt

    from kvx.cache.events import EventLog
    from kvx.cache.shared import Shared
    from kvx.cache.upkeep import CloseReport
    from kvx.metrics import Registry
    from kvx.namespace import Namespace
    from kvx.transfer.agents.agent import Agent


class TieredCache:
    """KV blocks in HBM, DRAM, NVMe, S3 and at peers. Open with `open`, use through `namespace`.

    A context manager; leaving it closes the cache. Thread-safe.
    """

    def __init__(self, config: CacheConfig, shared: Shared) -> None:
        """Take over assembled parts; use `open` instead."""
        self.config = config
        self._shared = shared
        self._upkeep = Upkeep(shared)
        self._finalizer = weakref.finalize(self, self._upkeep.forget)
        shared.events.take_snapshots_from(shared.held_keys)

    @classmethod
    def open(
        cls,
        config: object,
        *,
        progress: Callable[[str, int, int], None] | None = None,
        clock: Callable[[], float] = time.time,
        faults: FaultInjection | None = None,
        agent: Agent | None = None,
    ) -> Self:
        """Open the tiers a configuration names; recovers what NVMe holds from earlier.

        Args:
            config: A `CacheConfig`, a mapping, or the path of a YAML or TOML file.
            progress: Called with (what, done, total) while prefaulting and recovering.
            clock: Unix time in seconds.
            faults: For tests: faults to inject below the cache, and a journal of its writes.
            agent: For a tier of kind peer: an agent to share instead of one of its own. Stays
                open; close it after the cache.

        Raises:
            ConfigError: Unknown key or malformed value; names it.
            UsageError: An agent without a tier of kind peer.
            CapacityError: The machine does not have that much memory.
            UnavailableError: Another process has the NVMe directory open.
            IncompatibleError: The NVMe directory was made by another version or extent size.
            StorageError: The NVMe directory is damaged.
        """
        loaded = CacheConfig.load(config)
        shared = assemble(loaded, progress, clock, faults, agent)
        cache = cls(loaded, shared)
        shared.reactor.start()
        try:
            if shared.nvme is not None:
                restore(shared, shared.nvme, progress)
        except BaseException:
            cache.close(timeout_s=1.0)
            raise
        cache._upkeep.start()
        if shared.peers is not None:
            shared.peers.start()
        if shared.s3 is not None:
            shared.s3.start()
        return cache

    def namespace(self, **facts: object) -> CacheSpace:
        """Return the space of blocks that one model, in one layout, for one tenant may share.

        Args:
            **facts: The fields of `kvx.Namespace` by name; `model`, `dtype` and `block_bytes` are
                required, `tenant` and its `salt` come from the configuration where they are there.

        Raises:
            UsageError: A field is missing, unknown or malformed.
            ConfigError: Objects in S3 are sealed, and the tenant has no key for that.
            CapacityError: The DRAM tier can never hold a block of that size.
        """
        return self.space(self.config.namespace(facts))

    def space(self, namespace: Namespace) -> CacheSpace:
        """Return the space of an existing `Namespace` value; see `namespace`."""
        self._check_open()
        space = CacheSpace(self._shared, namespace, deadline_s=self.config.deadline_s, keep=self)
        self._apply_quotas(namespace)
        return space

    def clear(self) -> int:
        """Forget every block in every tier, pinned ones at unpin; returns how many there were.

        Objects in S3 stay: other machines may use them. `drop` deletes those of its blocks, and
        `kvx gc` any.
        """
        self._check_open()
        count = 0
        pools = self._shared.pools()
        held = [(pool.slot_bytes, pool.index.snapshot()["keys"]) for _, pool in pools]
        for tier, pool in [*pools, *reversed(pools)]:
            # Those of the other tier too: what is on its way between them must not arrive.
            keys = np.concatenate([keys for size, keys in held if size == pool.slot_bytes])
            count += self._shared.remove(pool, tier, keys, MissReason.DROPPED)
        self._shared.events.cleared()
        return count

    def flush(self, timeout_s: float = 60.0) -> bool:
        """Write to NVMe and S3 what waits for that; False when time was up first.

        What a lower tier does not take, because it is down or admission refuses it, is no longer
        waited for.
        """
        self._check_open()
        end = time.monotonic() + timeout_s
        flusher, s3 = self._shared.flusher, self._shared.s3
        is_flushed = flusher is None or flusher.flush(timeout_s)
        return is_flushed and (s3 is None or s3.flush(max(0.0, end - time.monotonic())))

    def stats(self) -> dict[str, dict[str, object]]:
        """Return numbers by tier, and those of the engine: for people and tests."""
        self._check_open()
        shared = self._shared
        totals: dict[str, collections.Counter[str]] = collections.defaultdict(collections.Counter)
        for tier, pool in self._shared.pools():
            counts = pool.index.stats()
            totals[tier.name.lower()].update(counts)
            totals[tier.name.lower()]["held_bytes"] += counts["committed"] * pool.slot_bytes
        stats: dict[str, dict[str, object]] = {tier: dict(sums) for tier, sums in totals.items()}
        for name, memory in (("hbm", shared.hbm), ("dram", shared.dram), ("nvme", shared.nvme)):
            if memory is not None:
                of_tier = stats.setdefault(name, {"held_bytes": 0})
                of_tier["capacity_bytes"] = memory.config.capacity_bytes
        if shared.nvme is not None:
            stats["nvme"]["breaker"] = shared.nvme.breaker.state
        stats["engine"] = shared.engine.stats()
        stats["copies"] = dict(shared.engine.copy_stats())
        if shared.peers is not None:
            stats["peer"] = shared.peers.stats()
        if shared.s3 is not None:
            stats["s3"] = shared.s3.stats()
        rewarm = self._upkeep.rewarm
        if rewarm is not None:
            stats["rewarm"] = {
                "blocks_total": rewarm.blocks_total,
                "blocks_done": rewarm.blocks_done,
                "blocks_warmed": rewarm.blocks_warmed,
                "is_done": rewarm.is_done,
            }
        return stats

    @property
    def agent(self) -> Agent | None:
        """What the tier of kind peer is connected through; None without one."""
        return None if self._shared.peers is None else self._shared.peers.agent

    @property
    def metrics(self) -> Registry:
        """The metrics; `cache.metrics.render()` is the Prometheus text."""
        return self._shared.instruments.registry

    @property
    def events(self) -> EventLog:
        """What was stored and removed, in order; replay, subscribe, and `snapshot` for a start."""
        return self._shared.events

    def snapshot(self) -> dict[str, npt.NDArray[np.uint8]]:
        """Return the keys held by each tier, (n, 16) uint8, coldest first."""
        self._check_open()
        return self._shared.held_keys()

    def check_integrity(self) -> None:
        """Verify the invariants of every index; raises AssertionError naming the broken one."""
        for _, pool in self._shared.pools():
            pool.index.check_integrity()

    def close(self, timeout_s: float = 10.0) -> CloseReport:
        """Flush, drain and close within a bound; calling it twice does no harm.

        Args:
            timeout_s: Seconds to spend on flushing and draining at most.
        """
        self._finalizer.detach()
        return self._upkeep.close(timeout_s)

    def __enter__(self) -> Self:
        """Return the cache."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Close it."""
        self.close()

    def _check_open(self) -> None:
        if not self._upkeep.is_open:
            raise UsageError("the cache is closed")

    def _apply_quotas(self, namespace: Namespace) -> None:
        """Let the tiers hold a tenant to its quotas, in pools to come as well."""
        tenant = self.config.tenant(namespace.tenant)
        if tenant is None:
            return
        owner = self._shared.names.owner_id(namespace.tenant_digest)
        shared = self._shared
        if shared.hbm is not None:
            shared.hbm.limits.set(owner, tenant.hbm_quota_bytes, shared.hbm.pools)
        shared.dram.limits.set(owner, tenant.dram_quota_bytes, shared.dram.pools)
        if shared.nvme is not None:
            shared.nvme.limits.set(owner, tenant.nvme_quota_bytes, shared.nvme.pools)

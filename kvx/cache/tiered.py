"""The cache: tiers under one roof, opened from a configuration, closed with a bound.

Where it sits: `TieredCache` owns everything; `CacheSpace` (one namespace of it) has the verbs.
Nothing here is done per block.
"""

from __future__ import annotations

import collections
import logging
import time
import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING, Self

import numpy as np

from kvx.cache.assembly import FaultInjection, assemble, restore
from kvx.cache.reasons import MissReason
from kvx.cache.result import TierKind
from kvx.cache.rewarm import Rewarm
from kvx.cache.space import CacheSpace
from kvx.config import CacheConfig
from kvx.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import TracebackType

    import numpy.typing as npt

    from kvx.cache.events import EventLog
    from kvx.cache.pool import Pool
    from kvx.cache.shared import Shared
    from kvx.metrics import Registry
    from kvx.namespace import Namespace

_log = logging.getLogger(__name__)
_SWEEP_S = 1.0
_SWEEP_BLOCKS_MAX = 10_000
_HEAT_EVERY_S = 30.0


@dataclass(frozen=True, slots=True)
class CloseReport:
    """What `close` had to leave behind.

    Attributes:
        unflushed_blocks: Blocks that were only in DRAM and are gone.
        abandoned_jobs: Jobs whose bytes the hardware had not let go of.
        abandoned_bytes: Their bytes; that memory is never freed.
    """

    unflushed_blocks: int
    abandoned_jobs: int
    abandoned_bytes: int


class TieredCache:
    """KV blocks in DRAM and NVMe. Open with `TieredCache.open`, use through `namespace`.

    A context manager; leaving it closes the cache. Thread-safe.
    """

    def __init__(self, config: CacheConfig, shared: Shared) -> None:
        """Take over assembled parts; use `open` instead."""
        self.config = config
        self._shared = shared
        self._rewarm: Rewarm | None = None
        self._is_open = True
        self._since_heat_s = 0.0
        shared.events.take_snapshots_from(self.snapshot)

    @classmethod
    def open(
        cls,
        config: object,
        *,
        progress: Callable[[str, int, int], None] | None = None,
        clock: Callable[[], float] = time.time,
        faults: FaultInjection | None = None,
    ) -> Self:
        """Open the tiers a configuration names; recovers what NVMe holds from earlier.

        Args:
            config: A `CacheConfig`, a mapping, or the path of a YAML or TOML file.
            progress: Called with (what, done, total) while prefaulting and recovering.
            clock: Unix time in seconds.
            faults: For tests: faults to inject below the cache, and a journal of its writes.

        Raises:
            ConfigError: Unknown key or malformed value; names it.
            CapacityError: The machine does not have that much memory.
            UnavailableError: Another process has the NVMe directory open.
            IncompatibleError: The NVMe directory was made by another version or extent size.
            StorageError: The NVMe directory is damaged.
        """
        loaded = CacheConfig.load(config)
        shared = assemble(loaded, progress, clock, faults)
        cache = cls(loaded, shared)
        shared.reactor.start()
        try:
            if shared.nvme is not None:
                restore(shared, shared.nvme, progress)
                if shared.nvme.config.rewarm:
                    cache._rewarm = Rewarm(shared, shared.nvme)
                    cache._rewarm.start()
        except BaseException:
            cache.close(timeout_s=1.0)
            raise
        shared.reactor.call_later(_SWEEP_S, cache._sweep)
        return cache

    def namespace(self, **facts: object) -> CacheSpace:
        """Return the space of blocks that one model, in one layout, for one tenant may share.

        Args:
            **facts: The fields of `kvx.Namespace` by name; `model`, `dtype` and `block_bytes` are
                required, `tenant` and its `salt` come from the configuration where they are there.

        Raises:
            UsageError: A field is missing, unknown or malformed.
            CapacityError: The DRAM tier can never hold a block of that size.
        """
        return self.space(self.config.namespace(facts))

    def space(self, namespace: Namespace) -> CacheSpace:
        """Return the space of an existing `Namespace` value; see `namespace`."""
        self._check_open()
        space = CacheSpace(self._shared, namespace, deadline_s=self.config.deadline_s)
        self._apply_quotas(namespace)
        return space

    def clear(self) -> int:
        """Forget every block in every tier, pinned ones at unpin; returns how many there were."""
        self._check_open()
        count = 0
        pools = self._pools()
        held = [(pool.slot_bytes, pool.index.snapshot()["keys"]) for _, pool in pools]
        for tier, pool in pools:
            # Those of the other tier too: what is on its way between them must not arrive.
            keys = np.concatenate([keys for size, keys in held if size == pool.slot_bytes])
            count += self._shared.remove(pool, tier, keys, MissReason.DROPPED)
        self._shared.events.cleared()
        return count

    def flush(self, timeout_s: float = 60.0) -> bool:
        """Write everything dirty to NVMe; True when it is all there. True without an NVMe tier."""
        self._check_open()
        flusher = self._shared.flusher
        return flusher is None or flusher.flush(timeout_s)

    def stats(self) -> dict[str, dict[str, object]]:
        """Return numbers by tier, and those of the engine: for people and tests."""
        self._check_open()
        shared = self._shared
        totals: dict[str, collections.Counter[str]] = collections.defaultdict(collections.Counter)
        for tier, pool in self._pools():
            totals[tier.name.lower()].update(pool.index.stats())
        stats: dict[str, dict[str, object]] = {tier: dict(sums) for tier, sums in totals.items()}
        stats["engine"] = shared.engine.stats()
        if self._rewarm is not None:
            stats["rewarm"] = {
                "blocks_total": self._rewarm.blocks_total,
                "blocks_done": self._rewarm.blocks_done,
                "blocks_warmed": self._rewarm.blocks_warmed,
                "is_done": self._rewarm.is_done,
            }
        return stats

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
        held: dict[str, list[npt.NDArray[np.uint8]]] = {}
        for tier, pool in self._pools():
            held.setdefault(tier.name.lower(), []).append(pool.index.snapshot()["keys"])
        return {tier: np.concatenate(keys) for tier, keys in held.items()}

    def check_integrity(self) -> None:
        """Verify the invariants of every index; raises AssertionError naming the broken one."""
        for _, pool in self._pools():
            pool.index.check_integrity()

    def close(self, timeout_s: float = 10.0) -> CloseReport:
        """Flush, drain and close within a bound; calling it twice does no harm.

        Args:
            timeout_s: Seconds to spend on flushing and draining at most.
        """
        if not self._is_open:
            return CloseReport(0, 0, 0)
        end = time.monotonic() + timeout_s
        shared = self._shared
        if self._rewarm is not None:
            self._rewarm.stop()
        unflushed = 0
        if shared.flusher is not None and shared.nvme is not None:
            is_flushed = shared.flusher.flush(max(0.0, (end - time.monotonic()) * 0.8))
            unflushed = 0 if is_flushed else shared.flusher.num_dirty
            shared.nvme.save_heat()
            shared.flusher.write_records()
            shared.flusher.flush(max(0.0, end - time.monotonic()))
        self._is_open = False
        left = shared.engine.close(max(0.1, end - time.monotonic()))
        shared.reactor.close(max(0.1, end - time.monotonic()))
        shared.dram.close(is_abandoned=left["abandoned_jobs"] > 0)
        if shared.nvme is not None:
            shared.nvme.close()
        report = CloseReport(unflushed, left["abandoned_jobs"], left["abandoned_bytes"])
        if report != CloseReport(0, 0, 0):
            _log.warning("closed the cache, leaving behind: %s", report)
        return report

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

    def __del__(self) -> None:
        """Close a forgotten cache, and say so."""
        if getattr(self, "_is_open", False):
            warnings.warn(
                "a TieredCache was not closed", ResourceWarning, source=self, stacklevel=2
            )
            self.close(timeout_s=1.0)

    def _check_open(self) -> None:
        if not self._is_open:
            raise UsageError("the cache is closed")

    def _pools(self) -> list[tuple[TierKind, Pool]]:
        shared = self._shared
        pools: list[tuple[TierKind, Pool]] = [
            (TierKind.DRAM, pool) for pool in list(shared.dram.pools.values())
        ]
        if shared.nvme is not None:
            pools += [(TierKind.NVME, pool) for pool in list(shared.nvme.pools.values())]
        return pools

    def _apply_quotas(self, namespace: Namespace) -> None:
        """Let the tiers hold a tenant to its quotas, in pools to come as well."""
        tenant = self.config.tenant(namespace.tenant)
        if tenant is None:
            return
        owner = self._shared.names.owner_id(namespace.tenant_digest)
        shared = self._shared
        shared.dram.limits.set(owner, tenant.dram_quota_bytes, shared.dram.pools)
        if shared.nvme is not None:
            shared.nvme.limits.set(owner, tenant.nvme_quota_bytes, shared.nvme.pools)

    def _sweep(self) -> None:
        """Expire what is due, write changed records, and save heat now and then."""
        if not self._is_open:
            return
        shared = self._shared
        for tier, pool in self._pools():
            with shared.events.changing():
                keys = pool.index.expire(shared.now_ms(), _SWEEP_BLOCKS_MAX)
                if len(keys):
                    shared.events.removed(keys, tier.name.lower(), MissReason.EXPIRED)
        self._since_heat_s += _SWEEP_S
        if shared.nvme is not None and shared.flusher is not None:
            if self._since_heat_s >= _HEAT_EVERY_S:
                self._since_heat_s = 0.0
                shared.nvme.save_heat()
            shared.flusher.write_records()
        shared.reactor.call_later(_SWEEP_S, self._sweep)

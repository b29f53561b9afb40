"""Putting a cache together from its configuration, and its blocks back from disk."""

from __future__ import annotations

import os
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from kvx.cache.admission import Admission
from kvx.cache.breaker import Breaker
from kvx.cache.device import DeviceAccess, DeviceLink, open_device
from kvx.cache.dram import DramTier
from kvx.cache.events import EventLog
from kvx.cache.flusher import Flusher
from kvx.cache.hbm import HbmTier
from kvx.cache.instruments import Instruments
from kvx.cache.nvme import NvmeTier
from kvx.cache.peer.opening import check_agent, open_peers
from kvx.cache.reactor import Reactor
from kvx.cache.refusals import Refusals
from kvx.cache.s3.opening import open_s3
from kvx.cache.shared import NamespaceTable, Shared
from kvx.cache.sightings import Sightings
from kvx.metrics import Registry
from kvx.tier_config import HbmTierConfig, NvmeTierConfig, PeerTierConfig, Prefault
from kvx_ext import _core

if TYPE_CHECKING:
    from collections.abc import Callable

    from kvx.cache.s3.store import ObjectStore
    from kvx.config import CacheConfig
    from kvx.transfer.agents.agent import Agent

    Progress = Callable[[str, int, int], None]

_HISTORY_ENTRIES = 1 << 18
# Which ways of copying the planner chose, and what went by them.
_COPY_GAUGES = {
    "bytes_h2d": "Bytes copied from host memory to the device",
    "bytes_d2h": "Bytes copied from the device to host memory",
    "bytes_d2d": "Bytes copied inside the device",
    "runs_batch": "Runs that were copied in batches",
    "runs_rows": "Runs that were copied as rows at a stride",
    "runs_single": "Runs that were copied by a call each",
    "runs_staged": "Runs that a kernel gathered or scattered",
    "kernels_launched": "Kernels launched; 0 for good with `sm: never`",
    "pageable_bytes": "Bytes copied from or to host memory that was not pinned",
}


@dataclass(frozen=True, slots=True)
class FaultInjection:
    """What a test puts below a cache.

    Attributes:
        failpoints: Rules for I/O and copies that go wrong; None for none.
        journal_path: File that every write and sync is recorded in; empty for none.
        bucket: Takes the place of the bucket that an S3 tier names; None for none.
    """

    failpoints: _core.Failpoints | None = None
    journal_path: str = ""
    bucket: ObjectStore | None = None


def assemble(
    config: CacheConfig,
    progress: Progress | None,
    clock: Callable[[], float],
    faults: FaultInjection | None,
    agent: Agent | None = None,
) -> Shared:
    """Open the tiers of a configuration; nothing is recovered and no thread runs yet.

    Raises:
        KvxError: As `TieredCache.open`; nothing is left open.
    """
    check_agent(config, agent)
    peer_config = config.tier(PeerTierConfig)
    history = _core.MissHistory(_HISTORY_ENTRIES)
    nvme_config = config.tier(NvmeTierConfig)
    with ExitStack() as undo:
        nvme = None
        if nvme_config is not None:
            nvme = NvmeTier(nvme_config, history, Breaker(config.breaker), clock)
            undo.callback(nvme.close)
        is_shared = peer_config is not None and peer_config.serve
        dram = DramTier(config.dram, history, is_shared=is_shared)
        _prefault(dram, progress)
        engine = _core.Engine(
            config.copy_threads or os.cpu_count() or 1,
            config.io_backend.value,
            nvme_config.queue_depth if nvme_config else 1,
            failpoints=faults.failpoints if faults else None,
            journal_path=faults.journal_path if faults else "",
        )
        undo.callback(engine.close, 1.0)
        device = _device_access(config, engine, dram, progress)
        undo.callback(device.close, is_abandoned=False)
        hbm_config = config.tier(HbmTierConfig)
        hbm = HbmTier(hbm_config, device.link().device, history) if hbm_config else None
        shared = Shared(
            engine=engine,
            reactor=Reactor(engine),
            hbm=hbm,
            dram=dram,
            nvme=nvme,
            flusher=None,
            admission=Admission(nvme_config.admission if nvme_config else None),
            events=EventLog(config.events_capacity),
            instruments=Instruments(Registry()),
            history=history,
            names=NamespaceTable(),
            sightings=Sightings(),
            refusals=Refusals(),
            clock=clock,
            device=device,
        )
        shared.s3 = open_s3(shared, config, faults.bucket if faults else None)
        if shared.s3 is not None:
            undo.callback(shared.s3.close, 1.0)
        shared.peers = open_peers(shared, config, agent)
        undo.pop_all()
    if nvme is not None:
        shared.flusher = Flusher(shared, nvme)
        if config.dram.prefault is Prefault.EAGER:
            # Registering populates what is not there yet, on one thread: only worth it afterwards.
            engine.register_buffer(dram.region.address, dram.region.size_bytes)
    _add_gauges(shared)
    return shared


def restore(shared: Shared, nvme: NvmeTier, progress: Progress | None) -> int:
    """Put the blocks that NVMe holds back into its indexes; returns how many.

    Raises:
        StorageError: The records cannot be read.
    """
    report = None if progress is None else lambda done, total: progress("recover", done, total)
    recovered = nvme.recover(report)
    count = 0
    for slot_bytes, found in recovered.pools.items():
        pool = nvme.pools[slot_bytes]
        records = found.records
        ids, owners = _names_of(shared, records.namespaces, records.payload_bytes, records.tenants)
        pool.namespace_ids[found.slots] = ids
        pool.expiries_s[found.slots] = records.expiry_s.astype(np.int64)
        pool.index.restore(
            records.keys,
            found.slots,
            records.generations,
            records.checksums,
            records.heat,
            records.expiry_s.astype(np.int64),
            owners.astype(np.int32),
        )
        count += len(found.slots)
    return count


def _names_of(
    shared: Shared, fingerprints: np.ndarray, block_bytes: np.ndarray, tenants: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Number the namespaces of recovered blocks; they need not have been opened by name yet."""
    facts = np.concatenate(
        [
            fingerprints,
            block_bytes[:, None].astype("<u4").view(np.uint8),
            tenants[:, None].astype("<u8").view(np.uint8),
        ],
        axis=1,
    )
    distinct, inverse = np.unique(facts, axis=0, return_inverse=True)
    ids = np.array(
        [
            shared.names.add(
                row[:16].tobytes(),
                int.from_bytes(row[16:20].tobytes(), "little"),
                int.from_bytes(row[20:28].tobytes(), "little"),
            )
            for row in distinct
        ],
        np.int32,
    )[inverse.reshape(-1)]
    return ids, shared.names.owners_of(ids)


def _device_access(
    config: CacheConfig, engine: _core.Engine, dram: DramTier, progress: Progress | None
) -> DeviceAccess:
    """Return the way to the device, which is not opened yet."""
    return DeviceAccess(
        lambda: DeviceLink(
            open_device(config.gpu, config.tier(HbmTierConfig)),
            config.gpu,
            engine,
            dram.region,
            progress=progress,
        )
    )


def _prefault(dram: DramTier, progress: Progress | None) -> None:
    """Wait for the memory when it is wanted eagerly, else let it be populated in the background."""
    region = dram.region

    def report(done: int, total: int) -> None:
        if progress is not None:
            progress("prefault", done, total)

    if dram.config.prefault is Prefault.EAGER:
        region.wait_prefaulted(report)


def _add_gauges(shared: Shared) -> None:
    gauge = shared.instruments.gauge
    engine = shared.engine
    gauge("kvx_quarantined_bytes", "Bytes of ended transfers that the hardware may still touch",
          lambda: float(engine.quarantined_bytes()))  # fmt: skip
    gauge("kvx_unsettled_jobs", "Native jobs whose bytes may still move",
          lambda: float(shared.reactor.num_unsettled))  # fmt: skip
    gauge("kvx_pinned_bytes", "Bytes of the DRAM tier that the device copies at full speed",
          lambda: float(shared.device.pinned_bytes))  # fmt: skip
    for name, explanation in _COPY_GAUGES.items():
        gauge(f"kvx_device_{name}", explanation,
              lambda name=name: float(engine.copy_stats()[name]))  # type: ignore[misc]  # fmt: skip
    nvme, flusher = shared.nvme, shared.flusher
    if nvme is not None and flusher is not None:
        gauge("kvx_nvme_is_up", "1 unless the breaker keeps the NVMe tier out",
              lambda: float(nvme.is_up()))  # fmt: skip
        gauge("kvx_nvme_used_bytes", "What the NVMe tier's files take",
              lambda: float(nvme.used_bytes))  # fmt: skip
        gauge("kvx_dirty_blocks", "Blocks that NVMe does not hold yet",
              lambda: float(flusher.num_dirty))  # fmt: skip
    s3 = shared.s3
    if s3 is not None:
        gauge("kvx_s3_is_up", "1 unless the breaker keeps the S3 tier out",
              lambda: float(s3.is_up()))  # fmt: skip
        gauge("kvx_s3_known_objects", "Objects that are known to be stored",
              lambda: float(len(s3.known)))  # fmt: skip
        gauge("kvx_s3_used_bytes", "Bytes of the objects that count against the capacity",
              lambda: float(s3.ledger.used_bytes))  # fmt: skip
        gauge("kvx_s3_pending_bytes", "Bytes of blocks that wait to be stored",
              lambda: float(s3.writing.pending_bytes))  # fmt: skip
    peers = shared.peers
    if peers is not None:
        gauge("kvx_peer_known_blocks", "Blocks that peers which answer are known to hold",
              lambda: float(peers.known_blocks))  # fmt: skip
        gauge("kvx_peer_sources", "Peers that may be asked for blocks",
              lambda: float(sum(not one.objection for one in peers.sources)))  # fmt: skip
        gauge("kvx_peer_listeners", "Peers that are told what this cache holds",
              lambda: float(peers.num_listeners))  # fmt: skip
        gauge("kvx_peer_in_flight_bytes", "Bytes on their way from peers",
              lambda: float(peers.in_flight_bytes))  # fmt: skip
        gauge("kvx_peer_lent_bytes", "Bytes that peers may read now",
              lambda: float(peers.lent_bytes))  # fmt: skip

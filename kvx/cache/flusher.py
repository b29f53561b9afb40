"""Blocks from DRAM to NVMe: payload first, then records, one group commit at a time.

Every block that NVMe does not hold yet is "dirty" in the DRAM index, which neither evicts nor
forgets it. The flusher takes the coldest dirty blocks, writes their payloads in several batches at
once, and then the record pages of everything that arrived meanwhile. Only after the records are
written (and synced, as `durability` asks) is a block committed on NVMe and clean in DRAM.

Invariant: at most one record write is under way, so a page is never written twice at once.
"""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from kvx.cache.disk.record import BlockRecords
from kvx.cache.reactor import Step
from kvx.cache.reasons import MissReason
from kvx.cache.result import TierKind
from kvx.tier_config import Durability, WriteMode
from kvx.transfer.codes import Code
from kvx_ext import _core

if TYPE_CHECKING:
    from collections.abc import Callable

    import numpy.typing as npt

    from kvx.cache.disk.writes import RecordWrites
    from kvx.cache.memory_tier import MemoryPool
    from kvx.cache.nvme import NvmePool, NvmeTier
    from kvx.cache.reactor import MovingJob
    from kvx.cache.shared import Shared

_BATCH_BYTES = 32 << 20
_BATCHES_IN_FLIGHT = 4
_DIRTY_SHARE_MAX = 0.5
_RESERVED = int(_core.ReserveOutcome.RESERVED)
_EXISTS = int(_core.ReserveOutcome.EXISTS)
_HELD = 1  # of BlockIndex.inspect
_NO_FDS = np.zeros(0, np.int32)


@dataclass(frozen=True, slots=True)
class _Batch:
    """Blocks on their way: their DRAM slots (pinned), and the NVMe slots reserved for them."""

    dram_pool: MemoryPool
    nvme_pool: NvmePool
    keys: npt.NDArray[np.uint8]
    dram_slots: npt.NDArray[np.int64]
    dram_generations: npt.NDArray[np.uint32]
    checksums: npt.NDArray[np.uint64]
    namespace_ids: npt.NDArray[np.int32]
    slots: npt.NDArray[np.int64]
    generations: npt.NDArray[np.uint32]

    def only(self, mask: npt.NDArray[np.bool_]) -> _Batch:
        """Return the rows where `mask` holds."""
        return _Batch(
            self.dram_pool,
            self.nvme_pool,
            self.keys[mask],
            self.dram_slots[mask],
            self.dram_generations[mask],
            self.checksums[mask],
            self.namespace_ids[mask],
            self.slots[mask],
            self.generations[mask],
        )


class Flusher:
    """Writes dirty blocks to NVMe. Thread-safe; all work happens in `kick` and in settled jobs."""

    def __init__(self, shared: Shared, nvme: NvmeTier) -> None:
        """Make it idle."""
        self._shared = shared
        self._nvme = nvme
        self._lock = threading.RLock()
        self._idle = threading.Condition(self._lock)
        self._in_flight = 0
        self._written: list[_Batch] = []
        self._is_writing_records = False
        self._wants_all = False
        self._listeners: list[Callable[[npt.NDArray[np.uint8], bool], None]] = []

    def on_flushed(self, listener: Callable[[npt.NDArray[np.uint8], bool], None]) -> None:
        """Call `listener(keys, is_durable)` whenever blocks stop being dirty."""
        self._listeners.append(listener)

    def forget(self, listener: Callable[[npt.NDArray[np.uint8], bool], None]) -> None:
        """Stop calling a listener."""
        with self._lock:
            if listener in self._listeners:
                self._listeners.remove(listener)

    @property
    def confirms_each(self) -> bool:
        """Whether an offload has to wait until its blocks are on NVMe."""
        return self._durability is Durability.EACH

    def holds(self, keys: npt.NDArray[np.uint8], block_bytes: int) -> npt.NDArray[np.bool_]:
        """Return (n,) bool: which blocks are on NVMe already."""
        pool = self._nvme.pool_if_any(block_bytes)
        if pool is None:
            return np.zeros(len(keys), np.bool_)
        return pool.find(keys, self._shared.now_ms()).mask

    def make_room(self) -> None:
        """Flush whatever the write mode: somebody needs the slots."""
        self._wants_all = True
        self.kick()

    def kick(self) -> None:
        """Start as many batches as may be under way."""
        with self._lock:
            for pool in list(self._shared.dram.pools.values()):
                while self._in_flight < _BATCHES_IN_FLIGHT and self._is_due(pool):
                    if not self._start_batch(pool):
                        break
            self._note_idle()

    def flush(self, timeout_s: float) -> bool:
        """Write everything that is dirty now; True when it is done in time."""
        end = time.monotonic() + timeout_s
        with self._lock:
            while self.num_dirty > 0 or self._in_flight > 0 or self._is_writing_records:
                self.make_room()
                if self.num_dirty == 0 and self._in_flight == 0 and not self._is_writing_records:
                    break
                is_woken = self._idle.wait(min(0.05, max(0.0, end - time.monotonic())))
                if not is_woken and time.monotonic() >= end:
                    return False
            return True

    def write_records(self) -> None:
        """Write the record pages that changed, unless a write of them is already under way."""
        with self._lock:
            if self._is_writing_records:
                return
            batches, self._written = self._written, []
            for batch in batches:
                self._set_records(batch)
            writes = self._nvme.take_record_writes()
            if len(writes) == 0:
                self._commit(batches, is_failed=False)
                return
            self._is_writing_records = True
        sync = _NO_FDS if self._durability is Durability.NONE else np.unique(writes.fds)
        self._shared.reactor.submit(
            lambda: Step(
                self._shared.engine.write(
                    writes.fds,
                    writes.offsets,
                    writes.addresses,
                    writes.bytes,
                    sync,
                    self._deadline_s,
                ),
                settle=lambda job: self._settle_records(job, batches, writes),
                give_up=lambda job: self._nvme.note_outcome(job.codes(), job.errnos()),
                keep=writes,
            )
        )

    @property
    def num_dirty(self) -> int:
        """Blocks that NVMe does not hold yet, those on their way included."""
        return sum(pool.num_dirty for pool in self._shared.dram.pools.values())

    @property
    def _durability(self) -> Durability:
        return self._nvme.config.durability

    @property
    def _deadline_s(self) -> float:
        return self._nvme.config.deadline_s

    def _is_due(self, pool: MemoryPool) -> bool:
        if pool.num_dirty == 0:
            return False
        if self._nvme.config.write is WriteMode.THROUGH or self._wants_all:
            return True
        return pool.num_dirty > _DIRTY_SHARE_MAX * pool.index.num_slots

    def _start_batch(self, pool: MemoryPool) -> bool:
        """Take dirty blocks of a pool and submit their payloads; False when there are none."""
        count = max(1, _BATCH_BYTES // pool.slot_bytes)
        keys, slots, generations, checksums = pool.index.take_dirty(count)
        if len(keys) == 0:
            return False
        namespace_ids = pool.namespace_ids[slots]
        nothing = np.full(len(keys), -1, np.int64)
        nvme_pool = self._nvme.pool_for(pool.slot_bytes)
        batch = _Batch(
            pool, nvme_pool, keys, slots, generations, checksums, namespace_ids, nothing,
            np.zeros(len(keys), np.uint32),
        )  # fmt: skip
        if not self._nvme.is_up():
            self._let_go(batch, MissReason.TIER_DOWN)
            return True
        batch = self._admit(batch)
        if len(batch.keys):
            batch = self._reserve(batch)
        if len(batch.keys):
            self._write_payloads(batch)
        return True

    def _admit(self, batch: _Batch) -> _Batch:
        accepted = self._shared.admission.accept(batch.keys, batch.dram_pool.slot_bytes)
        if not accepted.all():
            self._let_go(batch.only(~accepted), MissReason.ADMISSION_REJECTED)
        return batch.only(accepted)

    def _reserve(self, batch: _Batch) -> _Batch:
        """Reserve NVMe slots, owner by owner; what gets none is let go."""
        self._nvme.make_room(batch.nvme_pool, len(batch.keys))
        owners = self._shared.names.owners_of(batch.namespace_ids)
        expiries_s = batch.dram_pool.expiries_s[batch.dram_slots]
        outcomes = np.zeros(len(batch.keys), np.uint8)
        now_ms = self._shared.now_ms()
        for owner, expiry_s in {*zip(owners.tolist(), expiries_s.tolist(), strict=True)}:
            rows = (owners == owner) & (expiries_s == expiry_s)
            ttl_s = max(1, expiry_s - now_ms // 1000) if expiry_s else 0
            outcome, slots, generations, evicted = batch.nvme_pool.index.reserve(
                batch.keys[rows], owner, is_dirty=False, ttl_s=ttl_s, now_ms=now_ms
            )
            outcomes[rows] = outcome
            batch.slots[rows] = slots
            batch.generations[rows] = generations
            self._shared.note_evicted(TierKind.NVME, evicted)
        reserved = outcomes == _RESERVED
        exists = outcomes == _EXISTS
        if exists.any():
            self._let_go(batch.only(exists), MissReason.HIT)
        rest = ~(reserved | exists)
        if rest.any():
            self._let_go(batch.only(rest), MissReason.QUOTA)
        kept = self._still_wanted(batch.only(reserved))
        batch.nvme_pool.namespace_ids[kept.slots] = kept.namespace_ids
        batch.nvme_pool.expiries_s[kept.slots] = kept.dram_pool.expiries_s[kept.dram_slots]
        return kept

    def _still_wanted(self, batch: _Batch) -> _Batch:
        """Return the rows that nobody dropped since they were taken; the others are let go.

        A drop removes from DRAM, then from NVMe. Asked after reserving on NVMe, DRAM therefore
        knows of every drop that came too early to cancel the reservation.
        """
        held = batch.dram_pool.index.inspect(batch.keys, self._shared.now_ms()) == _HELD
        if not held.all():
            gone = batch.only(~held)
            gone.nvme_pool.index.abort(gone.slots, gone.generations)
            self._let_go(gone, MissReason.DROPPED)
        return batch.only(held)

    def _write_payloads(self, batch: _Batch) -> None:
        fds, offsets = batch.nvme_pool.locate(batch.slots)
        addresses = batch.dram_pool.addresses(batch.dram_slots)
        sizes = np.full(len(fds), batch.dram_pool.slot_bytes, np.int64)
        self._in_flight += 1
        self._shared.reactor.submit(
            lambda: Step(
                # Not synced: a record lies in the same file as its payload, its sync covers both.
                # Until then a record without its payload is found out by the checksum.
                self._shared.engine.write(
                    fds, offsets, addresses, sizes, _NO_FDS, self._deadline_s
                ),
                settle=lambda job: self._settle_payloads(job, batch),
                give_up=lambda job: self._nvme.note_outcome(job.codes(), job.errnos()),
                keep=self._shared.dram,
            )
        )

    def _settle_payloads(self, job: MovingJob, batch: _Batch) -> None:
        codes = job.codes()
        self._nvme.note_outcome(codes, job.errnos())
        arrived = codes == Code.OK
        with self._lock:
            self._in_flight -= 1
            if not arrived.all():
                self._abort(batch.only(~arrived))
            if arrived.any():
                self._written.append(batch.only(arrived))
        self.write_records()
        self.kick()

    def _set_records(self, batch: _Batch) -> None:
        spaces = self._shared.names.describe(batch.namespace_ids)
        now_s = self._shared.now_ms() // 1000
        count = len(batch.keys)
        self._nvme.set_records(
            batch.nvme_pool,
            batch.slots,
            BlockRecords(
                keys=batch.keys,
                payload_bytes=spaces.block_bytes,
                checksums=batch.checksums,
                generations=batch.generations,
                namespaces=spaces.fingerprints,
                tenants=spaces.tenants,
                heat=np.ones(count, np.uint8),
                stored_at_s=np.full(count, now_s, np.uint64),
                last_used_s=np.full(count, now_s, np.uint64),
                expiry_s=batch.dram_pool.expiries_s[batch.dram_slots].astype(np.uint64),
            ),
        )

    def _settle_records(self, job: MovingJob, batches: list[_Batch], writes: RecordWrites) -> None:
        codes = job.codes()
        self._nvme.note_outcome(codes, job.errnos())
        failed = codes[: len(writes)] != Code.OK
        self._nvme.end_record_writes(writes, failed)
        with self._lock:
            self._is_writing_records = False
            self._commit(batches, is_failed=bool(failed.any()) or job.state() != "done")
            # Under the lock: `flush` must not see us idle while records of drops are unwritten.
            self.write_records()
        self.kick()

    def _commit(self, batches: list[_Batch], *, is_failed: bool) -> None:
        for batch in batches:
            if is_failed:
                self._abort(batch)
                continue
            index = batch.nvme_pool.index
            with self._shared.events.changing():
                kept = index.commit(batch.slots, batch.generations, batch.checksums)
                arrived = batch.only(kept)
                for namespace_id in np.unique(arrived.namespace_ids).tolist():
                    keys = arrived.keys[arrived.namespace_ids == namespace_id]
                    self._shared.note_stored(namespace_id, TierKind.NVME, keys)
            if not kept.all():
                # Dropped on their way: their records are written by now and would bring them back.
                self._nvme.kill_records(batch.nvme_pool, batch.slots[~kept])
                self._let_go(batch.only(~kept), MissReason.DROPPED)
            self._let_go(arrived, MissReason.HIT)
        self._note_idle()

    def _abort(self, batch: _Batch) -> None:
        batch.nvme_pool.index.abort(batch.slots, batch.generations)
        self._nvme.kill_records(batch.nvme_pool, batch.slots)
        self._let_go(batch, MissReason.TIER_DOWN)

    def _let_go(self, batch: _Batch, reason: MissReason) -> None:
        """Make blocks clean and unpin them; they stay in DRAM until evicted."""
        index = batch.dram_pool.index
        index.mark_clean(batch.dram_slots, batch.dram_generations)
        index.unpin(batch.dram_slots, batch.dram_generations)
        self._shared.instruments.note_flush(reason, len(batch.keys))
        self._shared.refusals.note(batch.keys, reason)
        if self._listeners:
            # Later, without our lock: listeners have locks of their own, and call us under them.
            self._shared.reactor.call_later(0.0, lambda: self._tell(batch.keys, reason))

    def _tell(self, keys: npt.NDArray[np.uint8], reason: MissReason) -> None:
        with self._lock:
            listeners = list(self._listeners)
        for listener in listeners:
            listener(keys, reason is MissReason.HIT)

    def _note_idle(self) -> None:
        if self.num_dirty == 0:
            self._wants_all = False
        if self._in_flight == 0 and not self._is_writing_records:
            self._idle.notify_all()

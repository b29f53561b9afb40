"""Lends peers blocks of this cache: pinned in DRAM, leased to one peer, for the time it needs.

Invariant: a slot is unpinned only after its lease was revoked, so whoever still copies out of it
notices. What only NVMe holds is brought into DRAM first. A peer that goes, or takes too long, loses
its leases; what one may hold at a time is bounded.
"""

from __future__ import annotations

import logging
import threading
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from kvx.cache.peer.messages import Ask, Grant, as_keys, encode
from kvx.cache.pool import slot_bytes_for
from kvx.cache.reasons import MissReason
from kvx.cache.result import TierKind
from kvx.cache.warming import ColdBlocks, warm
from kvx.errors import KvxError, TransferTimeout
from kvx_ext import _core

if TYPE_CHECKING:
    from collections.abc import Callable

    import numpy.typing as npt

    from kvx.cache.memory_tier import MemoryPool
    from kvx.cache.peer.instruments import PeerInstruments
    from kvx.cache.peer.messages import Release
    from kvx.cache.pool import Found
    from kvx.cache.shared import Shared
    from kvx.transfer.agents.lease import BlockLease
    from kvx.transfer.agents.registration import Registration

_log = logging.getLogger(__name__)
# A lease lives so much longer than whoever asked for it has time left.
_GRACE_S = 1.0
# Share of the time left for waiting, for NVMe and for room, so that some is left for the bytes.
_PATIENCE_SHARE = 0.5
_LOOK_AGAIN_S = 0.005
_STILL_USED_S = 0.02
_DRAM_SHARE = 4
_WAITING_MAX = 1024
_WRITING = 3  # what `BlockIndex.inspect` answers


@dataclass(slots=True, eq=False)
class _Lent:
    """Blocks that a peer may read; `lease` ends before they are unpinned."""

    lease: BlockLease
    pool: MemoryPool
    found: Found
    keys: npt.NDArray[np.uint8]
    block_bytes: int

    @property
    def size_bytes(self) -> int:
        return len(self.keys) * self.block_bytes


@dataclass(slots=True, eq=False)
class _Asked:
    """An ask that is being answered."""

    peer: str
    ask: Ask
    keys: npt.NDArray[np.uint8]
    patient_until: float
    num_warming: int = 0

    @property
    def id(self) -> tuple[str, int]:
        return self.peer, self.ask.number


class Granting:
    """The loans of one cache. Its methods run on one thread."""

    def __init__(
        self,
        shared: Shared,
        registration: Registration,
        say: Callable[[str, bytes], None],
        instruments: PeerInstruments,
        *,
        lent_bytes_max: int,
    ) -> None:
        """Have lent nothing.

        Args:
            shared: The cache.
            registration: Its DRAM tier's memory.
            say: Sends a message to a peer, by name; raises KvxError when it cannot.
            instruments: Count what is lent.
            lent_bytes_max: Most bytes that are lent at a time; at most a quarter of DRAM is.
        """
        self._shared = shared
        self._registration = registration
        self._say = say
        self._instruments = instruments
        self._lent_bytes_max = min(
            lent_bytes_max, max(1, shared.dram.config.capacity_bytes // _DRAM_SHARE)
        )
        self._lent: dict[tuple[str, int], _Lent] = {}
        self._ending: list[_Lent] = []
        self._emptied = threading.Condition()
        self._is_open = True
        self._num_waiting = 0
        self.lent_bytes = 0

    def asked(self, peer: str, ask: Ask) -> None:
        """Answer an ask, once NVMe has given what it has of it."""
        if not self._is_open or (peer, ask.number) in self._lent:
            return
        keys = as_keys(ask.keys)
        self._go_on(_Asked(peer, ask, keys, time.monotonic() + ask.remaining_s * _PATIENCE_SHARE))

    def released(self, peer: str, release: Release) -> None:
        """End a loan, and look at what is said to be damaged."""
        lent = self._lent.pop((peer, release.number), None)
        if lent is None:
            return
        self._instruments.note_served(peer, release.blocks_done, lent.block_bytes)
        if release.suspects:
            self._examine(lent, as_keys(release.suspects))
        self._end(lent)

    def lost(self, peer: str) -> None:
        """End all loans to a peer."""
        for owner, number in list(self._lent):
            if owner == peer:
                self._end(self._lent.pop((owner, number)))

    def stop(self) -> None:
        """Lend nothing any more, and end all loans."""
        self._is_open = False
        for key in list(self._lent):
            self._end(self._lent.pop(key))

    def wait_idle(self, timeout_s: float) -> bool:
        """Wait until nothing is lent, after `stop`; False when time was up first. Any thread."""
        with self._emptied:
            return self._emptied.wait_for(lambda: self.lent_bytes == 0, timeout_s)

    def _go_on(self, asked: _Asked) -> None:
        """Answer when something can be lent, or the time to wait for that is over."""
        is_full = self._room_blocks(asked.ask.block_bytes) == 0 and self.lent_bytes > 0
        if self._is_open and is_full and time.monotonic() < asked.patient_until:
            self._wait(lambda: self._go_on(asked), lambda: self._answer(asked))
        elif not (self._is_open and self._warm(asked)):
            self._answer(asked)

    def _wait(self, go_on: Callable[[], None], refuse: Callable[[], None]) -> None:
        """Go on a little later, unless too many do that already."""
        if self._num_waiting >= _WAITING_MAX:
            refuse()
            return
        self._num_waiting += 1

        def over() -> None:
            self._num_waiting -= 1
            go_on()

        self._shared.reactor.call_later(_LOOK_AGAIN_S, over)

    def _warm(self, asked: _Asked) -> bool:
        """Begin to bring into DRAM what only NVMe holds; False when there is nothing to bring."""
        shared = self._shared
        nvme = shared.nvme
        cold = None if nvme is None else nvme.pool_if_any(asked.ask.block_bytes)
        pool = self._pool_of(asked.ask.block_bytes)
        keys = asked.keys
        remaining_s = asked.patient_until - time.monotonic()
        if nvme is None or cold is None or remaining_s <= 0 or not nvme.is_up():
            return False
        now_ms = shared.now_ms()
        absent = keys if pool is None else keys[~pool.find(keys, now_ms).mask]
        absent = absent[: max(0, self._room_blocks(asked.ask.block_bytes))]
        found = cold.find(absent, now_ms, touch=True, pin=True)
        held, found = absent[found.mask], found.only(found.mask)
        ids = cold.namespace_ids[found.slots]
        for one in np.unique(ids):
            rows = ids == one
            blocks = ColdBlocks(cold, held[rows], found.only(rows), int(one))
            asked.num_warming += warm(
                shared, nvme, blocks, remaining_s, lambda _: self._warmed(asked)
            )
        if asked.num_warming == 0 and len(held):
            # Somebody else is just bringing them, or there is no room for them now.
            asked.num_warming = 1
            self._wait(lambda: self._warmed(asked), lambda: self._answer(asked))
        return asked.num_warming > 0

    def _warmed(self, asked: _Asked) -> None:
        asked.num_warming -= 1
        if asked.num_warming == 0:
            self._go_on(asked)

    def _answer(self, asked: _Asked) -> None:
        pool = self._pool_of(asked.ask.block_bytes)
        reasons = np.full(len(asked.keys), int(MissReason.EVICTED), np.uint8)
        token, ttls_s = b"", b""
        if pool is not None and self._is_open:
            token, ttls_s = self._lend(asked, pool, reasons)
        try:
            self._say(asked.peer, encode(Grant(asked.ask.number, token, reasons.tobytes(), ttls_s)))
        except KvxError as error:
            _log.debug("%s was not answered: %s", asked.peer, error)
            lent = self._lent.pop(asked.id, None)
            if lent is not None:
                self._end(lent)

    def _lend(
        self, asked: _Asked, pool: MemoryPool, reasons: npt.NDArray[np.uint8]
    ) -> tuple[bytes, bytes]:
        """Lease what is here, and fill in why the rest is not."""
        shared, ask = self._shared, asked.ask
        found = pool.find(asked.keys, shared.now_ms(), touch=True, pin=True)
        sizes = shared.names.describe(pool.namespace_ids[np.maximum(found.slots, 0)]).block_bytes
        is_right = found.mask & (sizes == ask.block_bytes)
        is_lent = is_right & (np.cumsum(is_right) <= self._room_blocks(ask.block_bytes))
        pool.unpin(found.only(found.mask & ~is_lent))
        reasons[is_right] = MissReason.NO_ROOM
        reasons[is_lent] = MissReason.HIT
        writing = pool.index.inspect(asked.keys, shared.now_ms()) == _WRITING
        reasons[writing] = MissReason.IN_FLIGHT
        self._note_cold(asked, reasons)
        if not is_lent.any():
            return b"", b""
        keys, held = asked.keys[is_lent], found.only(is_lent)
        lease = self._lease(asked, pool, keys, held)
        if lease is None:
            pool.unpin(held)
            reasons[is_lent] = MissReason.NO_ROOM
            return b"", b""
        lent = _Lent(lease, pool, held, keys, ask.block_bytes)
        self._lent[asked.id] = lent
        self.lent_bytes += lent.size_bytes
        shared.reactor.call_later(ask.remaining_s + _GRACE_S, lambda: self._expire(asked, lent))
        expiries_s = pool.expiries_s[held.slots]
        if not expiries_s.any():
            return lease.token, b""
        left_s = np.maximum(expiries_s - shared.now_ms() // 1000, 1)
        return lease.token, np.where(expiries_s > 0, left_s, 0).astype("<u4").tobytes()

    def _note_cold(self, asked: _Asked, reasons: npt.NDArray[np.uint8]) -> None:
        """Say of blocks that NVMe holds that they are not gone, only not to be had in time."""
        cold = self._shared.nvme and self._shared.nvme.pool_if_any(asked.ask.block_bytes)
        if not cold:
            return
        gone = reasons == MissReason.EVICTED
        held = cold.find(asked.keys[gone], self._shared.now_ms()).mask
        reasons[np.flatnonzero(gone)[held]] = MissReason.NO_ROOM

    def _lease(
        self, asked: _Asked, pool: MemoryPool, keys: npt.NDArray[np.uint8], found: Found
    ) -> BlockLease | None:
        offsets = pool.addresses(found.slots) - self._registration.memory.address
        sizes = np.full(len(offsets), asked.ask.block_bytes, np.int64)
        try:
            return self._registration.lease(
                self._registration.descriptors(offsets, sizes),
                ttl_s=asked.ask.remaining_s + _GRACE_S,
                peer=asked.peer,
                checksums=found.checksums,
                keys=keys,
            )
        except KvxError as error:
            _log.warning("%d blocks cannot be lent to %s: %s", len(keys), asked.peer, error)
            return None

    def _expire(self, asked: _Asked, lent: _Lent) -> None:
        """End a loan whose time is over, unless it has ended."""
        if self._lent.get(asked.id) is lent:
            del self._lent[asked.id]
            self._end(lent)

    def _end(self, lent: _Lent) -> None:
        """Revoke the lease, and unpin the blocks as soon as nobody is at work under it."""
        try:
            lent.lease.revoke(0.0)
        except TransferTimeout:
            self._shared.reactor.call_later(_STILL_USED_S, lambda: self._end(lent))
            return
        lent.pool.unpin(lent.found)
        with self._emptied:
            self.lent_bytes -= lent.size_bytes
            self._emptied.notify_all()

    def _examine(self, lent: _Lent, suspects: npt.NDArray[np.uint8]) -> None:
        """Drop blocks that are damaged here; the peer's word alone proves nothing."""
        known = {key.tobytes(): row for row, key in enumerate(lent.keys)}
        rows = np.array(
            [known[key.tobytes()] for key in suspects if key.tobytes() in known], np.int64
        )
        if not len(rows):
            return
        memory = self._registration.memory
        offsets = lent.pool.addresses(lent.found.slots[rows]) - memory.address
        region = self._shared.dram.region.array()
        blocks = np.stack([region[start : start + lent.block_bytes] for start in offsets.tolist()])
        sums = _core.block_checksums(blocks, np.ascontiguousarray(lent.keys[rows]))
        damaged = rows[sums != lent.found.checksums[rows]]
        if len(damaged):
            self._shared.drop_corrupt(lent.pool, TierKind.DRAM, lent.keys[damaged])

    def _room_blocks(self, block_bytes: int) -> int:
        return max(0, self._lent_bytes_max - self.lent_bytes) // block_bytes

    def _pool_of(self, block_bytes: int) -> MemoryPool | None:
        """Return the DRAM pool of a size; None before this cache has one."""
        return self._shared.dram.pools.get(slot_bytes_for(block_bytes))

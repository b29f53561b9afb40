"""The verbs of the cache for one namespace: match, offload, onboard, prefetch, lease, pin, drop."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

import numpy as np

from kvx.block import as_hash_array
from kvx.cache.lease import Lease
from kvx.cache.memory_tier import Reservation
from kvx.cache.offload import Offload
from kvx.cache.onboard import Onboard
from kvx.cache.pool import Found
from kvx.cache.reasons import MissReason
from kvx.cache.residency import find_all, find_prefix
from kvx.cache.result import Location, Match, TierKind
from kvx.cache.s3.offering import offer_groups
from kvx.errors import UsageError
from kvx.layout import BlockSelection, BlockView

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy.typing as npt

    from kvx.cache.device import DeviceWay
    from kvx.cache.memory_tier import MemoryPool, MemoryTier
    from kvx.cache.result import TransferResult
    from kvx.cache.shared import Shared
    from kvx.namespace import Namespace
    from kvx.transfer.handle import Transfer

    Hashes = Sequence[bytes] | npt.NDArray[np.uint8]
    Blocks = object  # a BlockSelection, or any buffer that BlockView.of_blocks() takes


class CacheSpace:
    """One namespace of a `TieredCache`. Thread-safe.

    Hashes are the engine's own chained block hashes: a list of bytes of equal length (1 to 128), or
    an (n, k) uint8 array. Blocks are an (n, block_bytes) uint8 array in host memory, or a selection
    of an engine's paged cache (`kvx.BlockView(...).slots(ids)`).
    """

    def __init__(
        self, shared: Shared, namespace: Namespace, *, deadline_s: float, keep: object
    ) -> None:
        """Make the space; use `TieredCache.namespace` instead. Keeps its cache (`keep`) alive."""
        self._keep = keep
        self._shared = shared
        self.namespace = namespace
        self.block_bytes = namespace.block_bytes
        self.dram_pool = shared.dram.pool_for(namespace.block_bytes)
        self.hbm_pool = shared.hbm.pool_for(namespace.block_bytes) if shared.hbm else None
        self._memory: dict[TierKind, tuple[MemoryTier, MemoryPool]] = {
            TierKind.DRAM: (shared.dram, self.dram_pool)
        }
        if shared.hbm is not None and self.hbm_pool is not None:
            self._memory[TierKind.HBM] = (shared.hbm, self.hbm_pool)
        self.s3 = shared.s3 if shared.s3 and shared.s3.takes(namespace) else None
        self.namespace_id = shared.names.add(
            namespace.fingerprint, namespace.block_bytes, namespace.tenant_digest
        )
        shared.sightings.add_namespace(self.namespace_id, namespace)
        self._owner = shared.names.owner_id(namespace.tenant_digest)
        self._deadline_s = deadline_s
        self._pins: dict[bytes, list[tuple[int, int]]] = {}
        self._pins_lock = threading.Lock()

    def match(self, hashes: Hashes, *, wait_s: float = 0.0) -> Match:
        """Return how long a prefix of `hashes` is held, and where. Blocks on I/O only if asked to.

        What S3 holds is looked up in the background; until that is known `is_final` is False, and
        a later call may find more.

        Args:
            hashes: Block hashes from the start of the prompt.
            wait_s: Seconds to wait for S3 at most.
        """
        rows = as_hash_array(hashes)
        keys = self.namespace.keys(rows)
        tiers = np.zeros(len(keys), np.uint8)
        length = find_prefix(self._shared, self.s3, self.block_bytes, keys, tiers)
        is_final = True
        if self.s3 is not None and length < len(keys):
            is_final = self.s3.look_up(self.namespace_id, keys, length, wait_s)
            if is_final:
                length = find_prefix(self._shared, self.s3, self.block_bytes, keys, tiers)
        reason = MissReason.HIT
        if length < len(keys):
            tail = slice(length, length + 1)
            reason = MissReason(int(self.explain(keys[tail], rows[tail])[0]))
        self._shared.instruments.note_match(len(keys), tiers[:length], reason)
        return Match(length, tiers[:length], reason, is_final)

    def locate(self, hashes: Hashes, *, first: int = 0, wait_s: float = 0.0) -> Location:
        """Return which tier holds each block, for engines that do not want prefixes alone.

        Args:
            hashes: Block hashes from the start of the prompt.
            first: How many of them are not asked for; S3 is searched by where groups begin.
            wait_s: Seconds to wait for S3 at most.
        """
        rows = as_hash_array(hashes)
        keys = self.namespace.keys(rows)
        tiers = find_all(self._shared, self.s3, self.block_bytes, keys[first:])
        missing = np.flatnonzero(tiers == TierKind.NONE)
        is_final = True
        if self.s3 is not None and len(missing):
            begin = first + int(missing[0])
            is_final = self.s3.look_up(self.namespace_id, keys, begin, wait_s)
            if is_final:
                tiers[missing[self.s3.holds(keys[first + missing])]] = TierKind.S3
                missing = np.flatnonzero(tiers == TierKind.NONE)
        reason = MissReason.HIT
        length = len(tiers)
        if len(missing):
            length = int(missing[0])
            at = slice(first + length, first + length + 1)
            reason = MissReason(int(self.explain(keys[at], rows[at])[0]))
        self._shared.instruments.note_match(len(tiers), tiers[:length], reason)
        return Location(tiers, reason, is_final)

    def offload(
        self,
        hashes: Hashes,
        source: Blocks,
        *,
        prefix: Hashes = (),
        ttl_s: int = 0,
        deadline_s: float | None = None,
        after: object = None,
    ) -> Transfer[TransferResult]:
        """Copy blocks from the engine into the cache; returns at once.

        Args:
            hashes: n block hashes.
            source: n blocks; must not change until the transfer is terminal.
            prefix: Hashes of the blocks before these in the prompt, from its start on, if there are
                any: S3 keeps blocks in groups that are counted from there.
            ttl_s: Seconds after which the blocks expire; 0 for never.
            deadline_s: Seconds until the transfer ends whatever happens; None for the default.
            after: For device memory: the CUDA stream (CUstream as int, or an object with
                `__cuda_stream__`) that is writing the blocks; copies wait for its work so far.

        Raises:
            UsageError: The arguments do not fit each other; nothing was done.
            UnavailableError: The blocks lie in device memory and the device cannot be opened.
        """
        rows = as_hash_array(hashes)
        selection = self._select(source, len(rows), is_target=False)
        if ttl_s < 0:
            raise UsageError(f"ttl_s is {ttl_s}; 0 for never, else seconds")
        way = self._shared.device.way_for(selection.view, after)
        self._shared.sightings.note(rows, self.namespace_id)
        keys = self.namespace.keys(rows)
        transfer = Offload(
            self._shared,
            self,
            keys,
            selection,
            ttl_s=ttl_s,
            deadline_s=self._deadline_s if deadline_s is None else deadline_s,
            way=way,
        ).start()
        if self.s3 is not None:
            offer_groups(self.s3, self, transfer, keys, prefix)
        return transfer

    def onboard(
        self,
        hashes: Hashes,
        target: Blocks,
        *,
        deadline_s: float | None = None,
        after: object = None,
        is_layerwise: bool = False,
    ) -> Transfer[TransferResult]:
        """Copy blocks from the cache to the engine; returns at once.

        Of S3, what `match` or a prefetch has found before: nobody waits here for a search.

        A block that cannot be served is a miss with its reason in the result. Its target then holds
        what it held, or 0xFF bytes (NaN) if wrong bytes had been on their way there. Blocks for
        device memory are verified before they are sent, so there it always holds what it held.

        Args:
            hashes: n block hashes.
            target: n blocks, no block twice; belongs to kvx until the transfer is terminal.
            deadline_s: As for `offload`.
            after: For device memory: the stream that may still be using the target.
            is_layerwise: For layer-first device memory: bring the first layer of all blocks before
                the second of any; see `Transfer.wait_layer`.

        Raises:
            UsageError: The arguments do not fit each other; nothing was done.
            UnavailableError: The blocks lie in device memory and the device cannot be opened.
        """
        rows = as_hash_array(hashes)
        selection = self._select(target, len(rows), is_target=True)
        way = self._shared.device.way_for(selection.view, after, is_layerwise=is_layerwise)
        return self._fetch(rows, selection, deadline_s, way)

    def prefetch(
        self, hashes: Hashes, *, deadline_s: float | None = None
    ) -> Transfer[TransferResult]:
        """Bring blocks up into DRAM ahead of their use; as `onboard` without a target.

        Blocks that HBM has stay there alone: they are as high as they can be. Objects in S3 are
        looked for when `hashes` begin at the start of a prompt, and brought once they are found.
        """
        return self._fetch(as_hash_array(hashes), None, deadline_s)

    def expect_at(self, peer: str, hashes: Hashes) -> None:
        """Take somebody's word that a peer holds blocks, ahead of its own; returns at once.

        They are found there a moment later. It is believed as much as the peer itself: whatever it
        then lends is verified, and what it does not lend is a miss.

        Args:
            peer: Its name; of one that is not connected nothing is remembered.
            hashes: Block hashes, at most as many as `known_blocks_max`.
        """
        if self._shared.peers is not None:
            self._shared.peers.expect(peer, self.namespace.keys(as_hash_array(hashes)))

    def lease(self, hashes: Hashes, *, expires_s: float | None = None) -> Lease:
        """Pin the longest prefix held in DRAM and give zero-copy views of it.

        Blocks in lower tiers are not part of it: `prefetch` them first. Those that only HBM has are
        not either.

        Args:
            hashes: Block hashes from the start of the prompt.
            expires_s: Seconds after which the blocks may be evicted all the same; None for never.
        """
        keys = self.namespace.keys(as_hash_array(hashes))
        now_ms = self._shared.now_ms()
        index = self.dram_pool.index
        count, slots, generations, checksums = index.match(keys, now_ms, touch=True, pin=True)
        expires_ms = 0 if expires_s is None else now_ms + max(1, int(expires_s * 1000))
        lease_id = index.lease(slots[:count], generations[:count], expires_ms)
        index.unpin(slots[:count], generations[:count])
        found = Found(
            np.ones(count, np.bool_), slots[:count], generations[:count], checksums[:count]
        )
        return Lease(
            self._shared.dram,
            self.dram_pool,
            keys[:count],
            found,
            block_bytes=self.block_bytes,
            lease_id=lease_id,
        )

    def pin(self, hashes: Hashes) -> int:
        """Keep blocks that are in DRAM from being evicted; returns how many were there.

        Pins are counted: as many `unpin` calls are needed.
        """
        keys = self.namespace.keys(as_hash_array(hashes))
        found = self.dram_pool.find(keys, self._shared.now_ms(), pin=True)
        with self._pins_lock:
            for row in found.mask.nonzero()[0].tolist():
                held = (int(found.slots[row]), int(found.generations[row]))
                self._pins.setdefault(keys[row].tobytes(), []).append(held)
        return int(found.mask.sum())

    def unpin(self, hashes: Hashes) -> int:
        """Undo one `pin` of each block; returns how many were pinned."""
        keys = self.namespace.keys(as_hash_array(hashes))
        held: list[tuple[int, int]] = []
        with self._pins_lock:
            for key in map(bytes, keys):
                if key in self._pins:
                    held.append(self._pins[key].pop())
                    if not self._pins[key]:
                        del self._pins[key]
        if held:
            slots, generations = zip(*held, strict=True)
            self.dram_pool.index.unpin(np.array(slots, np.int64), np.array(generations, np.uint32))
        return len(held)

    def drop(self, hashes: Hashes) -> int:
        """Forget blocks in every tier; they do not come back after a restart.

        Returns:
            The number of blocks that were held in at least one tier.
        """
        keys = self.namespace.keys(as_hash_array(hashes))
        shared = self._shared
        now_ms = shared.now_ms()
        held = np.zeros(len(keys), np.bool_)
        pools = shared.pools_of(self.block_bytes)
        # Down and up again: on either way a block on the move is met before or after it arrives.
        for tier, pool in [*pools, *reversed(pools[:-1])]:
            held |= pool.find(keys, now_ms).mask
            shared.remove(pool, tier, keys, MissReason.DROPPED)
        if self.s3 is not None:
            held |= self.s3.drop(self.namespace_id, keys)
        return int(held.sum())

    def reserve(
        self, keys: npt.NDArray[np.uint8], *, is_dirty: bool, ttl_s: int = 0
    ) -> Reservation:
        """Reserve DRAM slots for keys of this namespace; for operations."""
        reservation = self._shared.dram.reserve(
            self.dram_pool,
            keys,
            owner=self._owner,
            namespace_id=self.namespace_id,
            is_dirty=is_dirty,
            ttl_s=ttl_s,
            now_ms=self._shared.now_ms(),
        )
        self._shared.note_evicted(TierKind.DRAM, reservation.evicted_keys)
        return reservation

    def reserve_until(
        self,
        keys: npt.NDArray[np.uint8],
        expiries_s: npt.NDArray[np.int64],
        tier: TierKind = TierKind.DRAM,
    ) -> Reservation:
        """Reserve slots for blocks that come from elsewhere and keep their expiry; 0 for none."""
        memory, pool = self._memory[tier]
        reservation = memory.reserve_until(
            pool,
            keys,
            expiries_s,
            owner=self._owner,
            namespace_id=self.namespace_id,
            now_ms=self._shared.now_ms(),
        )
        self._shared.note_evicted(tier, reservation.evicted_keys)
        return reservation

    def explain(
        self, keys: npt.NDArray[np.uint8], hashes: npt.NDArray[np.uint8]
    ) -> npt.NDArray[np.uint8]:
        """Say why blocks are not served, (n,) uint8 of `MissReason`; for operations."""
        return self._shared.explain(self.namespace_id, self.block_bytes, keys, hashes)

    def _fetch(
        self,
        hashes: npt.NDArray[np.uint8],
        target: BlockSelection | None,
        deadline_s: float | None,
        way: DeviceWay | None = None,
    ) -> Transfer[TransferResult]:
        return Onboard(
            self._shared,
            self,
            self.namespace.keys(hashes),
            hashes,
            target=target,
            deadline_s=self._deadline_s if deadline_s is None else deadline_s,
            way=way,
        ).start()

    def _select(self, blocks: Blocks, num_blocks: int, *, is_target: bool) -> BlockSelection:
        selection = blocks if isinstance(blocks, BlockSelection) else _all_of(blocks)
        if selection.block_bytes != self.block_bytes:
            raise UsageError(
                f"blocks of {selection.block_bytes} bytes, but the namespace has "
                f"block_bytes={self.block_bytes}"
            )
        if len(selection) != num_blocks:
            raise UsageError(f"{num_blocks} hashes but {len(selection)} blocks")
        if is_target:
            selection.check_writable()
        return selection


def _all_of(blocks: Blocks) -> BlockSelection:
    view = BlockView.of_blocks(blocks)
    return view.slots(np.arange(view.num_blocks, dtype=np.int64))

"""The S3 tier: groups of blocks as objects in one bucket, as one more place to look for blocks.

look_up   which groups of a prompt are stored        lookup, search, known
read      ranges of objects into DRAM slots          fetching, reads
offer     groups to be stored                        writing
tidy      what expires or is over capacity goes      tidying, ledger

All calls run on one thread of the tier, each within a deadline; nothing here waits for them.
"""

from __future__ import annotations

import dataclasses
import logging
import time
from typing import TYPE_CHECKING

import numpy as np

from kvx.cache.breaker import Breaker
from kvx.cache.reasons import MissReason
from kvx.cache.s3.effort import Effort
from kvx.cache.s3.format import GroupShape, object_name
from kvx.cache.s3.instruments import S3Instruments
from kvx.cache.s3.known import KnownObjects
from kvx.cache.s3.ledger import Ledger
from kvx.cache.s3.lookup import Lookups
from kvx.cache.s3.loop import LoopThread
from kvx.cache.s3.reads import Reads
from kvx.cache.s3.tidying import Tidying
from kvx.cache.s3.writing import Writing
from kvx.errors import UsageError
from kvx.tier_config import Eviction

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy.typing as npt

    from kvx.cache.s3.keyring import Keyring
    from kvx.cache.s3.seal import Sealer
    from kvx.cache.s3.store import ObjectStore
    from kvx.cache.shared import Shared
    from kvx.config import BreakerConfig
    from kvx.namespace import Namespace
    from kvx.tier_config import S3TierConfig

    Keys = npt.NDArray[np.uint8]
    Mask = npt.NDArray[np.bool_]

_log = logging.getLogger(__name__)
_STORE_CLOSE_S = 1.0
# A request that was cut sooner says nothing of the service.
_PATIENCE_S = 1.0


class S3Tier:
    """Objects that hold blocks of any namespace. Thread-safe.

    Attributes:
        config: The tier's configuration.
        store: The bucket; for the loop's thread.
        keyring: Which key seals whose objects.
        effort: How hard calls are tried; for the loop's thread, but for `stats`.
        known: What is known of objects.
        ledger: What they take.
        instruments: Its counters.
        loop: Where all calls run.
        reads: What is being read.
        writing: What is being stored.
    """

    def __init__(
        self,
        shared: Shared,
        config: S3TierConfig,
        breaker: BreakerConfig,
        store: ObjectStore,
        keyring: Keyring,
    ) -> None:
        """Take over a bucket; `start` begins to use it."""
        self.config = config
        self.store = store
        self.keyring = keyring
        self.instruments = S3Instruments(shared.instruments.registry)
        self._breaker = Breaker(breaker)
        self.effort = Effort(
            self._breaker,
            self.instruments,
            max_in_flight=config.max_in_flight,
            patience_s=min(_PATIENCE_S, config.deadline_s / 2),
        )
        self.known = KnownObjects(
            config.blocks_per_object, config.known_objects_max, config.absent_s
        )
        self.ledger = Ledger(
            config.capacity_bytes, config.ttl_s, is_touched=config.eviction is not Eviction.FIFO
        )
        self.loop = LoopThread("kvx-s3")
        self._shared = shared
        self.reads = Reads(shared, self)
        self.writing = Writing(shared, self)
        self._lookups = Lookups(self)
        self._tidying = Tidying(self)

    def start(self) -> None:
        """Begin to tidy."""
        self.loop.spawn(self._tidying.run())

    def is_up(self) -> bool:
        """Return whether it may be used now (a half-open breaker lets a probe through)."""
        return self._breaker.allow()

    def holds(self, keys: Keys) -> Mask:
        """Return which of (n, 16) uint8 keys objects are known to hold, while it is up."""
        return self.known.find(keys).mask & self.is_up()

    def is_out_of_reach(self, keys: Keys) -> Mask:
        """Return which of (n, 16) uint8 keys it is known to hold and cannot be asked for now."""
        return self.known.find(keys).mask & (not self.is_up())

    def look_up(self, namespace_id: int, keys: Keys, num_held: int, wait_s: float) -> bool:
        """Find out how many groups of a prompt are stored, beginning where other tiers end.

        Args:
            namespace_id: Of the prompt.
            keys: (n, 16) uint8, from the start of the prompt on.
            num_held: Blocks of it that are known to be held.
            wait_s: Seconds to wait at most; 0 only begins.

        Returns:
            False while it is not known yet.
        """
        return self._lookups.ensure(namespace_id, keys, num_held, wait_s)

    def takes(self, namespace: Namespace) -> bool:
        """Return whether its blocks can be stored as objects; says why not in the log.

        Raises:
            ConfigError: Objects are sealed, and its tenant has no key.
        """
        self.keyring.check(namespace.tenant)
        try:
            self._shape(namespace.block_bytes)
        except UsageError as error:
            _log.warning("blocks of %d bytes are not kept in S3: %s", namespace.block_bytes, error)
            return False
        return True

    def shape_of(self, namespace_id: int) -> GroupShape:
        """Return how objects of a namespace are made."""
        facts = self._shared.names.describe(np.array([namespace_id], np.int32))
        return self._shape(int(facts.block_bytes[0]))

    def sealer_of(self, namespace_id: int) -> Sealer | None:
        """Return what seals the objects of a namespace; None where they are not sealed."""
        return self.keyring.of(self._shared.names.tenant_of(namespace_id))

    def name_of(self, namespace_id: int, last_key: bytes) -> str:
        """Return the name of the object of a group, by the key of its last block."""
        public_id = self._shared.names.public_id(namespace_id)
        sealer = self.sealer_of(namespace_id)
        return object_name(
            self.config.prefix, public_id, self.config.blocks_per_object, last_key,
            seal_id=sealer.id if sealer else b"",
        )  # fmt: skip

    def ends_at(self) -> float:
        """Return when a call that begins now has to end, of the monotonic clock."""
        return time.monotonic() + self.config.deadline_s

    def drop(self, namespace_id: int, keys: Keys) -> Mask:
        """Delete the objects that are known to hold blocks, with all in them, for every machine.

        Returns:
            (n,) bool, which of the blocks that was.
        """
        held = self.known.find(keys).mask
        last_keys = self.forget(keys, MissReason.DROPPED)
        for last_key in last_keys:
            self.known.note_absent(last_key)
        self.delete([self.name_of(namespace_id, last_key) for last_key in last_keys], "dropped")
        return held

    def forget(self, keys: Keys, reason: MissReason) -> list[bytes]:
        """Serve nothing from objects that go; returns the keys of their last blocks."""
        gone = self.known.beside(keys)
        last_keys = self.known.forget(keys)
        if len(gone):
            self._shared.events.removed(gone, "s3", reason)
        return last_keys

    def delete(self, names: Sequence[str], reason: str) -> None:
        """Delete objects some time soon."""
        if len(names) and not self.config.is_read_only:
            self.loop.spawn(self._tidying.delete(list(names), reason))

    def stats(self) -> dict[str, object]:
        """Return numbers for people and tests."""
        return {
            "known_objects": len(self.known),
            "used_bytes": self.ledger.used_bytes,
            "stored_bytes": self.instruments.stored_bytes,
            "pending_bytes": self.writing.pending_bytes,
            "is_up": self.is_up(),
            **dataclasses.asdict(self.effort.stats()),
        }

    def flush(self, timeout_s: float) -> bool:
        """Store everything that was offered; False when time was up first."""
        return self.writing.wait_idle(timeout_s)

    def stop(self, timeout_s: float) -> int:
        """Read no more, and store what was offered; returns the blocks that were not in time."""
        self.reads.close()
        left = self.writing.close(timeout_s)
        if left:
            _log.warning("%d blocks were not stored in %s in time", left, self.config.bucket)
        return left

    def close(self, timeout_s: float) -> None:
        """End all calls; reads that were under way have ended by now, or end as cancelled."""
        self.loop.wait(self.store.close(), min(timeout_s, _STORE_CLOSE_S))
        self.loop.close(timeout_s)

    def _shape(self, block_bytes: int) -> GroupShape:
        return GroupShape(self.config.blocks_per_object, block_bytes, self.keyring.is_sealing)

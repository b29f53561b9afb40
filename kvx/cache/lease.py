"""Zero-copy views of blocks in DRAM that cannot be evicted while the lease is held."""

from __future__ import annotations

import ctypes
import warnings
from typing import TYPE_CHECKING, Self

import numpy as np

from kvx.errors import StaleReference

if TYPE_CHECKING:
    from types import TracebackType

    import numpy.typing as npt

    from kvx.cache.dram import DramTier
    from kvx.cache.memory_tier import MemoryPool
    from kvx.cache.pool import Found


class Lease:
    """A prefix of blocks in DRAM, pinned until `release`, the end of `with`, or its expiry.

    The views are read-only and must not be used after the lease has ended: `check` before and after
    reading tells whether they were the blocks all along.
    """

    def __init__(
        self,
        tier: DramTier,
        pool: MemoryPool,
        keys: npt.NDArray[np.uint8],
        found: Found,
        *,
        block_bytes: int,
        lease_id: int,
    ) -> None:
        """Take over pinned blocks; use `CacheSpace.lease` instead."""
        self._tier: DramTier | None = tier
        self._pool = pool
        self._keys = keys
        self._found = found
        self._block_bytes = block_bytes
        self._lease_id = lease_id

    def __len__(self) -> int:
        """Return the number of blocks leased."""
        return len(self._keys)

    @property
    def addresses(self) -> npt.NDArray[np.int64]:
        """Host addresses of the blocks, (n,) int64."""
        return self._pool.addresses(self._found.slots)

    @property
    def checksums(self) -> npt.NDArray[np.uint64]:
        """Checksums of the blocks, (n,) uint64."""
        return self._found.checksums

    def view(self, block: int) -> npt.NDArray[np.uint8]:
        """Return block number `block` of the lease: (block_bytes,) uint8, read-only, no copy.

        Raises:
            StaleReference: The lease has ended.
        """
        if self._tier is None:
            raise StaleReference("the lease was released; take a new one")
        address = int(self.addresses[block])
        memory = (ctypes.c_uint8 * self._block_bytes).from_address(address)
        array: npt.NDArray[np.uint8] = np.ctypeslib.as_array(memory)
        array.flags.writeable = False
        return array

    def check(self) -> None:
        """Raise StaleReference if any block was reused since the lease was taken."""
        if self._tier is None:
            raise StaleReference("the lease was released; take a new one")
        live = self._pool.index.validate(self._keys, self._found.slots, self._found.generations)
        if not live.all():
            raise StaleReference(
                f"{int((~live).sum())} of {len(live)} leased blocks were reused: the lease expired"
            )

    def release(self) -> None:
        """Let the blocks be evicted again; calling it twice does no harm."""
        if self._tier is not None:
            self._tier = None
            self._pool.index.release(self._lease_id)

    def __enter__(self) -> Self:
        """Return the lease."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Release it."""
        self.release()

    def __del__(self) -> None:
        """Release a forgotten lease, and say so."""
        if getattr(self, "_tier", None) is not None:
            warnings.warn("a lease was never released", ResourceWarning, source=self, stacklevel=2)
            self.release()

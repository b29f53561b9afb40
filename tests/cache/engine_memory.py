"""Memory of an engine for tests: on the simulated GPU, or host memory where there is none."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

import kvx
from tests.cache.conftest import BLOCK_BYTES, make_blocks, make_hashes
from tests.cache.on_device import DeviceArray, Gpu

if TYPE_CHECKING:
    import numpy.typing as npt

UNTOUCHED = 7


class EngineMemory:
    """(n, block_bytes) uint8 blocks where an engine would have them.

    Attributes:
        blocks: What the cache is given: device memory with a GPU, else an array.
    """

    def __init__(self, gpu: Gpu | None, rows: npt.NDArray[np.uint8]) -> None:
        """Put blocks there."""
        self._gpu = gpu
        self.blocks: DeviceArray | npt.NDArray[np.uint8] = rows.copy()
        if gpu is not None:
            array = DeviceArray(gpu.device, (rows.shape[0], rows.shape[1]))
            array.upload(gpu.driver, rows)
            self.blocks = array

    def read(self) -> npt.NDArray[np.uint8]:
        """Return what is in it now."""
        if isinstance(self.blocks, DeviceArray):
            assert self._gpu is not None, "it is its memory"
            return self.blocks.download(self._gpu.driver)
        return self.blocks


def empty(gpu: Gpu | None, count: int, block_bytes: int = BLOCK_BYTES) -> EngineMemory:
    """Return blocks that nobody has written yet."""
    return EngineMemory(gpu, np.full((count, block_bytes), UNTOUCHED, np.uint8))


def plain_space(
    cache: kvx.TieredCache, *, block_bytes: int = BLOCK_BYTES, **facts: object
) -> kvx.CacheSpace:
    """Open the namespace of a test model; blocks lie where the test puts them."""
    return cache.namespace(model="test", dtype="float16", block_bytes=block_bytes, **facts)


def store(
    space: kvx.CacheSpace,
    gpu: Gpu | None,
    count: int,
    *,
    first: int = 0,
    step: int = 8,
    ttl_s: int = 0,
) -> None:
    """Offload blocks from the engine's memory, a few at a time."""
    for start in range(first, first + count, step):
        rows = min(step, first + count - start)
        memory = EngineMemory(gpu, make_blocks(rows, first=start))
        result = space.offload(make_hashes(rows, first=start), memory.blocks, ttl_s=ttl_s).wait()
        assert result.num_blocks == rows


def fetch(
    space: kvx.CacheSpace, gpu: Gpu | None, count: int, *, first: int = 0
) -> kvx.TransferResult:
    """Onboard blocks; require right bytes where they were served, none where they were missed."""
    target = empty(gpu, count)
    result = space.onboard(make_hashes(count, first=first), target.blocks).wait()
    got, wanted = target.read(), make_blocks(count, first=first)
    served = result.reasons == kvx.MissReason.HIT
    assert (got[served] == wanted[served]).all(), "wrong bytes were served"
    missed = got[~served]
    is_honest = (missed == UNTOUCHED).all(axis=1) | (missed == 0xFF).all(axis=1)
    assert is_honest.all(), "a miss left bytes behind"
    return result


def held(cache: kvx.TieredCache, tier: str) -> set[bytes]:
    """Return the keys that a tier holds."""
    return {key.tobytes() for key in cache.snapshot()[tier]}


def hbm_addresses(space: kvx.CacheSpace, hashes: npt.NDArray[np.uint8]) -> list[int]:
    """Return where blocks lie in HBM; all of them must be there."""
    pool = space.hbm_pool
    assert pool is not None
    found = pool.find(space.namespace.keys(hashes), 0)
    assert found.mask.all(), "not in HBM"
    return [int(address) for address in pool.addresses(found.slots)]

"""Rows of an onboard on their way from NVMe or HBM into DRAM slots and on, as one native job."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from kvx.cache.memory_tier import MemoryPool
from kvx.cache.nvme import NvmePool
from kvx.transfer.codes import Code

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from kvx.cache.device import DeviceWay
    from kvx.cache.nvme import NvmeTier
    from kvx.cache.pool import Found, Pool
    from kvx.cache.reactor import MovingJob
    from kvx.cache.result import TierKind
    from kvx.layout import BlockSelection
    from kvx_ext import _core

# A read that takes so long is the device's fault.
_SLOW_READ_S = 1.0


@dataclass(frozen=True, slots=True)
class ReadBatch:
    """Where the rows come from and the DRAM slots they go to.

    `is_shared` is False where the slot is private to this operation and is let go afterwards.
    """

    tier: TierKind
    pool: Pool
    rows: npt.NDArray[np.int64]
    found: Found
    slots: npt.NDArray[np.int64]
    generations: npt.NDArray[np.uint32]
    is_shared: npt.NDArray[np.bool_]


@dataclass(frozen=True, slots=True)
class Landing:
    """Where the blocks of an onboard go: through DRAM slots to a target, if there is one.

    Attributes:
        pool: The DRAM pool.
        block_bytes: Size of a block.
        target: Where to; None to leave them in DRAM.
        way: How the target is reached.
        progress: Is told what has arrived; None for host memory.
    """

    pool: MemoryPool
    block_bytes: int
    target: BlockSelection | None
    way: DeviceWay
    progress: _core.LayerProgress | None


class Verdict:
    """Tells NVMe's breaker how one read did: once, as soon as it has ended.

    A read that hangs in the device for ever never settles, so its timeout has to tell.
    """

    def __init__(self, nvme: NvmeTier | None, deadline_s: float) -> None:
        """Judge a read of NVMe, or nothing, that was given so long."""
        self._nvme = nvme
        self._is_patient = deadline_s >= _SLOW_READ_S

    def note(self, job: MovingJob) -> None:
        """Take a read that has ended; harmless to repeat. One that was cancelled tells nothing."""
        nvme, self._nvme = self._nvme, None
        if nvme is None or job.state() == "cancelled":
            return
        codes = job.codes()
        # A caller in a hurry says nothing about the device.
        telling = (codes != Code.TIMEOUT) | self._is_patient
        if telling.any():
            nvme.note_outcome(codes[telling], job.errnos()[telling])


def read_files(
    engine: _core.Engine,
    batch: ReadBatch,
    keys: npt.NDArray[np.uint8],
    landing: Landing,
    deadline_s: float,
) -> _core.Job:
    """Begin to read a batch from NVMe; each block goes on as soon as its own bytes are there."""
    assert isinstance(batch.pool, NvmePool), "reads are from files"
    fds, offsets = batch.pool.locate(batch.found.slots)
    target, way = landing.target, landing.way
    return engine.read(
        fds,
        offsets,
        landing.pool.addresses(batch.slots),
        landing.block_bytes,
        batch.pool.slot_bytes,
        keys,
        batch.found.checksums,
        None if target is None else target.planes,
        None if target is None else target.ids[batch.rows],
        deadline_s,
        way.link is not None,
        way.mark,
        landing.progress,
        way.layer_planes,
    )


def fetch_device(
    engine: _core.Engine,
    batch: ReadBatch,
    keys: npt.NDArray[np.uint8],
    landing: Landing,
    deadline_s: float,
) -> _core.Job:
    """Begin to fetch a batch from HBM for a target in host memory."""
    assert isinstance(batch.pool, MemoryPool), "fetches are from memory"
    assert landing.target is not None, "what HBM has needs no prefetch"
    return engine.fetch(
        batch.pool.addresses(batch.found.slots),
        landing.pool.addresses(batch.slots),
        landing.block_bytes,
        keys,
        batch.found.checksums,
        landing.target.planes,
        landing.target.ids[batch.rows],
        deadline_s,
    )

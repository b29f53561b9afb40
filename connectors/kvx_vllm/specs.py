"""What scheduler and workers tell one another. Crosses processes inside vLLM."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from vllm.distributed.kv_transfer.kv_connector.v1.offloading.common import (
    OffloadingConnectorMetadata,
    OffloadingWorkerMetadata,
)
from vllm.v1.kv_offload.base import LoadStoreSpec

if TYPE_CHECKING:
    from kvx_vllm.telling import Told


@dataclass(slots=True)
class Run:
    """Consecutive blocks of one group of a prompt.

    Attributes:
        group: Place among the connector's groups.
        hashes: vLLM's hashes of the blocks.
        prefix: Hashes of all blocks before them, where somebody counts from the start.
        tiers: `kvx.TierKind` of each block that is to be loaded: where it was found.
    """

    group: int
    hashes: list[bytes]
    prefix: list[bytes] = field(default_factory=list)
    tiers: bytearray = field(default_factory=bytearray)


@dataclass(slots=True)
class KvxBlocks(LoadStoreSpec):
    """The blocks of one job, in vLLM's order: group by group.

    Attributes:
        req_id: Whose.
        runs: Them.
        life: Of the cache, when the job was made: what is stored for an earlier one is void.
    """

    req_id: str
    runs: list[Run]
    life: int = 0


@dataclass(slots=True)
class LoadFailure:
    """Blocks that a rank could not load.

    Attributes:
        req_id: Of the request that wanted them.
        group: Place among the connector's groups.
        hashes: Of the blocks.
        reasons: Why, by the names of `kvx.MissReason`.
    """

    req_id: str
    group: int
    hashes: list[bytes]
    reasons: list[str]


@dataclass
class KvxMetadata(OffloadingConnectorMetadata):
    """What the scheduler tells the workers in a step.

    Attributes:
        is_idle: Whether nothing is computed in it.
    """

    is_idle: bool = False


@dataclass
class KvxWorkerMetadata(OffloadingWorkerMetadata):
    """What a worker tells the scheduler after a step.

    Attributes:
        failures: Blocks that could not be loaded.
        told: What the ranks tell besides.
    """

    failures: list[LoadFailure] = field(default_factory=list)
    told: Told | None = None

    def aggregate(self, other: OffloadingWorkerMetadata) -> KvxWorkerMetadata:
        """Return what two ranks said together."""
        both = super().aggregate(other)
        assert isinstance(other, KvxWorkerMetadata)
        told = self.told or other.told
        if self.told is not None and other.told is not None:
            told = self.told.plus(other.told)
        return KvxWorkerMetadata(
            both.completed_jobs,
            both.transfer_stats,
            [*self.failures, *other.failures],
            told,
        )

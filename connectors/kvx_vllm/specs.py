"""What scheduler and workers tell one another. Crosses processes inside vLLM."""

from __future__ import annotations

from dataclasses import dataclass, field

from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorHandshakeMetadata
from vllm.distributed.kv_transfer.kv_connector.v1.offloading.common import (
    OffloadingWorkerMetadata,
)
from vllm.v1.kv_offload.base import LoadStoreSpec


@dataclass(slots=True)
class Run:
    """Consecutive blocks of one group of a prompt.

    Attributes:
        group: Place among the connector's groups.
        hashes: vLLM's hashes of the blocks.
        prefix: Hashes of all blocks before them, where somebody counts from the start.
    """

    group: int
    hashes: list[bytes]
    prefix: list[bytes] = field(default_factory=list)


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
class RankAddress(KVConnectorHandshakeMetadata):
    """Where a rank can be asked; told to the scheduler once, at start.

    Attributes:
        rank: Which.
        path: Of the socket it listens on.
    """

    rank: int
    path: str


@dataclass
class KvxWorkerMetadata(OffloadingWorkerMetadata):
    """What a worker tells the scheduler after a step.

    Attributes:
        failures: Blocks that could not be loaded.
    """

    failures: list[LoadFailure] = field(default_factory=list)

    def aggregate(self, other: OffloadingWorkerMetadata) -> KvxWorkerMetadata:
        """Return what two ranks said together."""
        both = super().aggregate(other)
        failures = [*self.failures, *getattr(other, "failures", ())]
        return KvxWorkerMetadata(both.completed_jobs, both.transfer_stats, failures)

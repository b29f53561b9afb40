"""What the scheduler tells the worker of a load or a store. Crosses processes inside vLLM."""

from __future__ import annotations

from dataclasses import dataclass, field

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
    """

    req_id: str
    runs: list[Run]


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

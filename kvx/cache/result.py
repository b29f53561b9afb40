"""What the verbs of the cache return: values that say what was found, and why not more."""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import TYPE_CHECKING

from kvx.cache.reasons import MissReason

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt


class TierKind(enum.IntEnum):
    """Where a block was found; NONE where it was not."""

    NONE = 0
    HBM = 1
    DRAM = 2
    NVME = 3
    S3 = 4
    PEER = 5


@dataclass(frozen=True, slots=True)
class Match:
    """How much of a prompt's prefix the cache holds.

    Attributes:
        num_blocks: Length of the longest prefix that is held, in blocks.
        tiers: (num_blocks,) uint8, the highest `TierKind` that holds each of them.
        reason: Why the prefix ends there; HIT when everything asked for is held.
        is_final: False while S3 has not said whether it holds more; ask again.
    """

    num_blocks: int
    tiers: npt.NDArray[np.uint8]
    reason: MissReason
    is_final: bool = True

    def blocks_in(self, tier: TierKind) -> int:
        """Return how many of the blocks would come from `tier`."""
        return int((self.tiers == tier).sum())


@dataclass(frozen=True, slots=True)
class Location:
    """Where the blocks of a prompt are.

    Attributes:
        tiers: (n,) uint8, the highest `TierKind` that holds each, NONE for those not held.
        reason: Why the first that is not held is not; HIT when all are.
        is_final: False while S3 has not said whether it holds more; ask again.
    """

    tiers: npt.NDArray[np.uint8]
    reason: MissReason
    is_final: bool = True


@dataclass(frozen=True, slots=True)
class TransferResult:
    """What became of each block of a transfer.

    Attributes:
        reasons: (n,) uint8 `MissReason` of each block; 0 (HIT) where its bytes arrived.
        tiers: (n,) uint8 `TierKind` that served each block, NONE where none did.
        bytes_done: Bytes that arrived and were verified.
        elapsed_s: From the call to the terminal state.
    """

    reasons: npt.NDArray[np.uint8]
    tiers: npt.NDArray[np.uint8]
    bytes_done: int
    elapsed_s: float

    @property
    def num_blocks(self) -> int:
        """Number of blocks that arrived."""
        return int((self.reasons == MissReason.HIT).sum())

    @property
    def prefix_blocks(self) -> int:
        """Number of leading blocks that arrived: what an engine may build on."""
        missed = (self.reasons != MissReason.HIT).nonzero()[0]
        return int(missed[0]) if len(missed) else len(self.reasons)

    def count(self, reason: MissReason) -> int:
        """Return the number of blocks with this reason."""
        return int((self.reasons == reason).sum())

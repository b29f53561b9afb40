"""What a rank tells the scheduler when a step ends: its numbers, and what its tiers hold now."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import kvx
from kvx_vllm.events import EventReader
from kvx_vllm.metrics import RankMeter, Tally

if TYPE_CHECKING:
    from collections.abc import Sequence

    from kvx_vllm.events import TierChange
    from kvx_vllm.jobs import Job, Part
    from kvx_vllm.rank_cache import RankCache


@dataclass(frozen=True, slots=True)
class Served:
    """A block that came from another tier than it was found in: it had left that, or was damaged.

    Attributes:
        req_id: Of the request that loaded it.
        group: Place among the connector's groups.
        block_hash: vLLM's.
        tier: Where it came from.
    """

    req_id: str
    group: int
    block_hash: bytes
    tier: kvx.TierKind


@dataclass(frozen=True, slots=True)
class Told:
    """Of one rank, or of several together; crosses processes inside vLLM.

    Attributes:
        tally: What was counted.
        diverted: Blocks that came from elsewhere.
        changes: What came to tiers and left them, where anybody listens.
    """

    tally: Tally = field(default_factory=Tally)
    diverted: list[Served] = field(default_factory=list)
    changes: list[TierChange] = field(default_factory=list)

    def plus(self, other: Told) -> Told:
        """Return what both say."""
        return Told(
            self.tally.plus(other.tally),
            [*self.diverted, *other.diverted],
            [*self.changes, *other.changes],
        )


class RankTelling:
    """Gathered by the worker, taken once a step. Of the worker's thread alone."""

    def __init__(self, rank_cache: RankCache, rank: int, *, has_events: bool) -> None:
        """Begin; `has_events` is whether anybody listens to vLLM's KV events."""
        self._groups = rank_cache.groups
        self._meter = RankMeter(rank_cache.cache.stats, rank)
        self._events = EventReader(rank_cache, rank) if has_events else None
        self._diverted: list[Served] = []

    def began(self, direction: str, parts: Sequence[Part]) -> None:
        """Note the transfers of a load or a store."""
        self._meter.began(direction, self._bytes_of(parts))
        if self._events is not None:
            for part in parts:
                self._events.expect(part.run.group, part.hashes)

    def moved(self, job: Job, part: Part, result: kvx.TransferResult) -> None:
        """Note what one transfer of it moved."""
        group = part.run.group
        self._meter.moved(job.direction, result, self._groups[group].space.block_bytes)
        if not job.is_load or part.run.tiers in (b"", result.tiers.tobytes()):
            return  # mostly all came from where they were found
        found = dict(zip(part.run.hashes, part.run.tiers, strict=True))
        for one, tier in zip(part.hashes, result.tiers.tolist(), strict=True):
            if tier not in (found[one], kvx.TierKind.NONE):
                kind = kvx.TierKind(tier)
                self._diverted.append(Served(job.blocks.req_id, group, one, kind))

    def ended(self, direction: str, parts: Sequence[Part], seconds: float) -> None:
        """Note that all of it is over."""
        self._meter.ended(direction, self._bytes_of(parts), seconds)

    def take(self) -> Told | None:
        """Return what there is to tell since the last call; None for nothing."""
        tally = self._meter.take()
        changes = [] if self._events is None else self._events.read()
        diverted, self._diverted = self._diverted, []
        if tally is None and not changes and not diverted:
            return None
        return Told(tally or Tally(), diverted, changes)

    def _bytes_of(self, parts: Sequence[Part]) -> int:
        return sum(
            len(part.hashes) * self._groups[part.run.group].space.block_bytes for part in parts
        )

"""What a rank tells the scheduler when a step ends: its numbers, and what its tiers hold now."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvx_vllm.events import EventReader
from kvx_vllm.metrics import RankMeter

if TYPE_CHECKING:
    from collections.abc import Sequence

    import kvx
    from kvx_vllm.events import TierChange
    from kvx_vllm.metrics import Tally
    from kvx_vllm.rank_cache import RankCache
    from kvx_vllm.worker import Part


class RankTelling:
    """Gathered by the worker, taken once a step. Of the worker's thread alone."""

    def __init__(self, rank_cache: RankCache, rank: int, *, has_events: bool) -> None:
        """Begin; `has_events` is whether anybody listens to vLLM's KV events."""
        self._groups = rank_cache.groups
        self._meter = RankMeter(rank_cache.cache.stats, rank)
        self._events = EventReader(rank_cache, rank) if has_events else None

    def began(self, direction: str, parts: Sequence[Part]) -> None:
        """Note the transfers of a load or a store."""
        self._meter.began(direction, self._bytes_of(parts))
        if self._events is not None:
            for part in parts:
                self._events.expect(part.run.group, part.hashes)

    def moved(self, direction: str, part: Part, result: kvx.TransferResult) -> None:
        """Note what one transfer of it moved."""
        block_bytes = self._groups[part.run.group].space.block_bytes
        self._meter.moved(direction, result, block_bytes)

    def ended(self, direction: str, parts: Sequence[Part], seconds: float) -> None:
        """Note that all of it is over."""
        self._meter.ended(direction, self._bytes_of(parts), seconds)

    def take(self) -> tuple[Tally | None, list[TierChange]]:
        """Return what there is to tell since the last call."""
        return self._meter.take(), [] if self._events is None else self._events.read()

    def _bytes_of(self, parts: Sequence[Part]) -> int:
        return sum(
            len(part.hashes) * self._groups[part.run.group].space.block_bytes for part in parts
        )

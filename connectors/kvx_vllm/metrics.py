"""What the connector counts: in the workers, carried to the scheduler, told through vLLM's metrics.

vLLM asks the scheduler alone, once a step. So a rank counts into a `Tally`, which goes there with
what the step brings back anyway; no process is ever asked for its numbers.
"""

from __future__ import annotations

import time
from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from vllm.distributed.kv_transfer.kv_connector.v1.offloading.metrics import (
    OffloadingConnectorStats,
)
from vllm.v1.kv_offload.base import (
    OffloadingCounterMetadata,
    OffloadingGaugeMetadata,
    OffloadingHistogramMetadata,
    OffloadingMetricMetadata,
)

import kvx

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    from kvx_vllm.pd.reference import Outcome

LEVELS_EVERY_S = 1.0
_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
# In the order of how much they keep out.
_BREAKER = {"closed": 0, "half_open": 1, "open": 2}

HIT_TOKENS = "vllm:kvx_hit_tokens"
MISSES = "vllm:kvx_misses"
LOAD_FAILURES = "vllm:kvx_load_failures"
BYTES = "vllm:kvx_bytes"
SECONDS = {"load": "vllm:kvx_load_seconds", "store": "vllm:kvx_store_seconds"}
REFERENCES = "vllm:kvx_pd_references"
IN_FLIGHT = "vllm:kvx_in_flight_bytes"
QUARANTINED = "vllm:kvx_quarantined_bytes"
PENDING = "vllm:kvx_s3_pending_bytes"
HELD = "vllm:kvx_tier_held_bytes"
CAPACITY = "vllm:kvx_tier_capacity_bytes"
BREAKER = "vllm:kvx_tier_breaker"

Labels = tuple[str, ...]
Level = tuple[str, Labels]


def definitions() -> dict[str, OffloadingMetricMetadata]:
    """Return every metric by name, as vLLM registers them."""
    counter, gauge = OffloadingCounterMetadata, OffloadingGaugeMetadata
    return {
        HIT_TOKENS: counter("Tokens of prompts that were loaded, by tier", ("tier",)),
        MISSES: counter("Prompts whose cached prefix ended early, by reason", ("reason",)),
        LOAD_FAILURES: counter(
            "Blocks that were found and not brought, so computed, by reason", ("reason",)
        ),
        BYTES: counter(
            "Bytes moved by all ranks: load from a tier to the engine, store into a tier",
            ("tier", "direction"),
        ),
        SECONDS["load"]: OffloadingHistogramMetadata(
            "Time of a rank's loads, from the call until the engine may go on", buckets=_SECONDS
        ),
        SECONDS["store"]: OffloadingHistogramMetadata(
            "Time of a rank's stores into its highest tier", buckets=_SECONDS
        ),
        REFERENCES: counter(
            "References to prefilled blocks that requests came with, by outcome", ("outcome",)
        ),
        IN_FLIGHT: gauge("Bytes of loads and stores under way", ("direction", "rank")),
        QUARANTINED: gauge(
            "Bytes of ended transfers that the hardware may still touch", ("rank",)
        ),
        PENDING: gauge("Bytes that wait to be stored in S3", ("rank",)),
        HELD: gauge("Bytes of the blocks that a tier holds", ("tier", "rank")),
        CAPACITY: gauge("Bytes that a tier may hold", ("tier", "rank")),
        BREAKER: gauge(
            "What a tier's breaker does: 0 closed, 1 half-open, 2 open", ("tier", "rank")
        ),
    }  # fmt: skip


@dataclass(slots=True)
class Tally:
    """What ranks counted since they last told; crosses processes inside vLLM.

    Attributes:
        bytes_moved: By tier and direction.
        seconds: Of every load and store, by direction.
        levels: Of gauges by name and labels, which tell the rank.
    """

    bytes_moved: Counter[Labels] = field(default_factory=Counter)
    seconds: dict[str, list[float]] = field(default_factory=dict)
    levels: dict[Level, float] = field(default_factory=dict)

    def __bool__(self) -> bool:
        """Return whether there is anything to tell."""
        return bool(self.bytes_moved or self.seconds or self.levels)

    def plus(self, other: Tally) -> Tally:
        """Return what both counted, the later one last."""
        seconds = {
            direction: [*self.seconds.get(direction, ()), *other.seconds.get(direction, ())]
            for direction in {**self.seconds, **other.seconds}
        }
        return Tally(self.bytes_moved + other.bytes_moved, seconds, {**self.levels, **other.levels})


class RankMeter:
    """Counts in one rank. Of the worker's thread alone."""

    def __init__(
        self,
        stats: Callable[[], Mapping[str, Mapping[str, object]]],
        rank: int,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Begin with what the cache did before as known.

        Args:
            stats: `kvx.TieredCache.stats`.
            rank: Of the worker.
            clock: Seconds.
        """
        self._stats = stats
        self._rank = str(rank)
        self._clock = clock
        self._tally = Tally()
        self._in_flight: Counter[str] = Counter()
        self._written = _bytes_written(stats())
        self._next_levels_s = 0.0

    def began(self, direction: str, num_bytes: int) -> None:
        """Note a load or a store that is under way now."""
        self._in_flight[direction] += num_bytes

    def moved(self, direction: str, result: kvx.TransferResult, block_bytes: int) -> None:
        """Count what one transfer moved."""
        if direction == "store":
            self._tally.bytes_moved["dram", direction] += result.bytes_done
            return
        tiers = result.tiers[result.reasons == kvx.MissReason.HIT]
        for tier, count in Counter(tiers.tolist()).items():
            name = kvx.TierKind(tier).name.lower()
            self._tally.bytes_moved[name, direction] += count * block_bytes

    def ended(self, direction: str, num_bytes: int, seconds: float) -> None:
        """Note that a load or a store is over, with the bytes that `began` was told."""
        self._in_flight[direction] -= num_bytes
        self._tally.seconds.setdefault(direction, []).append(seconds)

    def take(self) -> Tally | None:
        """Return what was counted since the last call, the levels now and then; None for nothing.

        With levels about 50 us: they are read once in `LEVELS_EVERY_S` at most.
        """
        now_s = self._clock()
        if now_s >= self._next_levels_s:
            self._next_levels_s = now_s + LEVELS_EVERY_S
            self._read_levels()
        if not self._tally:
            return None
        tally, self._tally = self._tally, Tally()
        return tally

    def _read_levels(self) -> None:
        stats = self._stats()
        for tier, num_bytes in _bytes_written(stats).items():
            if num_bytes > self._written[tier]:
                self._tally.bytes_moved[tier, "store"] += num_bytes - self._written[tier]
            self._written[tier] = num_bytes
        levels = self._tally.levels
        for direction in SECONDS:
            levels[IN_FLIGHT, (direction, self._rank)] = self._in_flight[direction]
        levels[QUARANTINED, (self._rank,)] = _number(stats["engine"], "quarantined_bytes")
        for tier in ("hbm", "dram", "nvme", "s3"):
            of_tier = stats.get(tier)
            if of_tier is None:
                continue
            here = (tier, self._rank)
            levels[HELD, here] = _number(of_tier, "used_bytes" if tier == "s3" else "held_bytes")
            if "capacity_bytes" in of_tier:
                levels[CAPACITY, here] = _number(of_tier, "capacity_bytes")
            if "breaker" in of_tier:
                levels[BREAKER, here] = _BREAKER[str(of_tier["breaker"])]
            if "pending_bytes" in of_tier:
                levels[PENDING, (self._rank,)] = _number(of_tier, "pending_bytes")


class Meter:
    """Gathers, in the scheduler, what vLLM fetches once a step."""

    def __init__(self) -> None:
        """Have nothing to tell."""
        self._stats = OffloadingConnectorStats()

    def note_prompt(self, tokens: Mapping[str, int], reason: kvx.MissReason) -> None:
        """Count a prompt when it is scheduled: what was loaded by tier, and why not more."""
        for tier, count in tokens.items():
            if count:
                self._stats.increase_counter(HIT_TOKENS, count, (tier,))
        if reason is not kvx.MissReason.HIT:
            self._stats.increase_counter(MISSES, 1, (reason.name.lower(),))

    def note_failures(self, reasons: Iterable[str]) -> None:
        """Count blocks that did not come."""
        for reason in reasons:
            self._stats.increase_counter(LOAD_FAILURES, 1, (reason,))

    def note_references(self, outcomes: Mapping[Outcome, int]) -> None:
        """Count references that requests came with, by what became of them."""
        for outcome, count in outcomes.items():
            self._stats.increase_counter(REFERENCES, count, (str(outcome),))

    def note_tally(self, tally: Tally) -> None:
        """Take what the ranks counted."""
        for labels, num_bytes in tally.bytes_moved.items():
            self._stats.increase_counter(BYTES, num_bytes, labels)
        for direction, seconds in tally.seconds.items():
            for one in seconds:
                self._stats.observe_histogram(SECONDS[direction], one)
        for (name, labels), value in tally.levels.items():
            self._stats.set_gauge(name, value, labels)

    def take(self) -> OffloadingConnectorStats | None:
        """Return what there is to tell since the last call; None for nothing."""
        if self._stats.is_empty():
            return None
        stats, self._stats = self._stats, OffloadingConnectorStats()
        return stats


def _bytes_written(stats: Mapping[str, Mapping[str, object]]) -> dict[str, int]:
    """Return what went into the tiers that are written behind everybody's back."""
    written = {}
    if "nvme" in stats:
        writes = stats["engine"]["write"]
        assert isinstance(writes, dict)
        written["nvme"] = int(writes["bytes"])
    if "s3" in stats:
        written["s3"] = int(_number(stats["s3"], "stored_bytes"))
    return written


def _number(stats: Mapping[str, object], name: str) -> float:
    value = stats[name]
    assert isinstance(value, int | float), f"{name} is {value!r}"
    return value

"""The counters and histograms of one cache, under the names that `cache.metrics` renders."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvx.cache.reasons import MissReason
from kvx.cache.result import TierKind

if TYPE_CHECKING:
    from collections.abc import Callable

    import numpy as np
    import numpy.typing as npt

    from kvx.cache.result import TransferResult
    from kvx.errors import KvxError
    from kvx.metrics import Registry


class Instruments:
    """What a cache counts. Thread-safe, a few hundred nanoseconds a batch."""

    def __init__(self, registry: Registry) -> None:
        """Register everything under `kvx_`."""
        self.registry = registry
        self._transfers = registry.counter(
            "kvx_transfers_total", "Transfers by verb and terminal state", ("verb", "state")
        )
        self._blocks = registry.counter(
            "kvx_blocks_total", "Blocks moved by verb and the tier that served them",
            ("verb", "tier"),
        )  # fmt: skip
        self._misses = registry.counter(
            "kvx_misses_total", "Blocks not served, by reason", ("verb", "reason")
        )
        self._bytes = registry.counter(
            "kvx_bytes_total", "Bytes moved and verified, by verb", ("verb",)
        )
        self._latency = registry.histogram(
            "kvx_transfer_seconds", "Time from the call to the terminal state", ("verb",)
        )
        self._evicted = registry.counter(
            "kvx_evicted_blocks_total", "Blocks let go to make room, by tier", ("tier",)
        )
        self._corrupt = registry.counter(
            "kvx_corrupt_blocks_total", "Blocks whose bytes proved wrong, by tier", ("tier",)
        )
        self._flushed = registry.counter(
            "kvx_flushed_blocks_total", "Blocks that stopped being dirty, by outcome", ("outcome",)
        )
        self._matches = registry.counter(
            "kvx_match_blocks_total", "Blocks asked for by match, by where they were", ("tier",)
        )

    def gauge(self, name: str, explanation: str, read: Callable[[], float]) -> None:
        """Register a gauge that is read when the metrics are rendered."""
        self.registry.gauge(name, explanation, read)

    def note_transfer(self, verb: str, result: TransferResult, error: KvxError | None) -> None:
        """Count a transfer that became terminal."""
        self._transfers.add(1, (verb, "done" if error is None else type(error).__name__))
        self._bytes.add(result.bytes_done, (verb,))
        self._latency.observe(result.elapsed_s, (verb,))
        arrived = result.reasons == MissReason.HIT
        for tier in TierKind:
            count = int((arrived & (result.tiers == tier)).sum())
            if count:
                self._blocks.add(count, (verb, tier.name.lower()))
        for reason in MissReason:
            count = 0 if reason is MissReason.HIT else result.count(reason)
            if count:
                self._misses.add(count, (verb, reason.name.lower()))

    def note_match(self, num_asked: int, tiers: npt.NDArray[np.uint8], reason: MissReason) -> None:
        """Count a match by what it found and why it ended."""
        for tier in TierKind:
            count = int((tiers == tier).sum())
            if count:
                self._matches.add(count, (tier.name.lower(),))
        if reason is not MissReason.HIT:
            self._matches.add(num_asked - len(tiers), ("none",))
            self._misses.add(1, ("match", reason.name.lower()))

    def note_evicted(self, tier: TierKind, count: int) -> None:
        """Count blocks that a tier let go to make room."""
        self._evicted.add(count, (tier.name.lower(),))

    def note_corrupt(self, tier: TierKind, count: int) -> None:
        """Count blocks whose bytes proved wrong."""
        self._corrupt.add(count, (tier.name.lower(),))

    def note_flush(self, reason: MissReason, count: int) -> None:
        """Count blocks that stopped being dirty; HIT means they are on NVMe now."""
        outcome = "written" if reason is MissReason.HIT else reason.name.lower()
        self._flushed.add(count, (outcome,))

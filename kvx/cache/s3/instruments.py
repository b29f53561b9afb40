"""What an S3 tier counts, under the names that `cache.metrics` renders."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from kvx.cache.s3.store import ObjectFault
    from kvx.metrics import Registry


class S3Instruments:
    """The counters of one tier. Thread-safe."""

    def __init__(self, registry: Registry) -> None:
        """Register everything under `kvx_s3_`."""
        self._calls = registry.counter(
            "kvx_s3_calls_total", "Calls that ended, retries included, by verb and outcome",
            ("verb", "outcome"),
        )  # fmt: skip
        self._call_time = registry.histogram(
            "kvx_s3_call_seconds", "Time of calls that succeeded, waiting included", ("verb",)
        )
        self._requests = registry.counter(
            "kvx_s3_requests_total", "Requests that ended, by verb and outcome", ("verb", "outcome")
        )
        self._request_time = registry.histogram(
            "kvx_s3_request_seconds", "Time of requests that succeeded", ("verb",)
        )
        self._retries = registry.counter(
            "kvx_s3_retries_total", "Requests made again, by verb and why", ("verb", "fault")
        )
        self._hedges = registry.counter(
            "kvx_s3_hedges_total", "Second requests made because the first was slow", ("verb",)
        )
        self._hedges_won = registry.counter(
            "kvx_s3_hedges_won_total", "Those of them that were answered first", ("verb",)
        )
        self._bytes = registry.counter(
            "kvx_s3_bytes_total", "Bytes of objects moved, by direction", ("direction",)
        )
        self._groups = registry.counter(
            "kvx_s3_groups_total", "Groups of blocks offered to be stored, by outcome", ("outcome",)
        )
        self._lookups = registry.counter(
            "kvx_s3_lookups_total", "Prefixes that were looked for, by outcome", ("outcome",)
        )
        self._deleted = registry.counter(
            "kvx_s3_deleted_objects_total", "Objects deleted, by reason", ("reason",)
        )

    def note_call(self, verb: str, seconds: float, fault: ObjectFault | None) -> None:
        """See `EffortInstruments`."""
        self._calls.add(1, (verb, "ok" if fault is None else fault.value))
        if fault is None:
            self._call_time.observe(seconds, (verb,))

    def note_attempt(self, verb: str, seconds: float, fault: ObjectFault | None) -> None:
        """See `EffortInstruments`."""
        self._requests.add(1, (verb, "ok" if fault is None else fault.value))
        if fault is None:
            self._request_time.observe(seconds, (verb,))

    def note_retry(self, verb: str, fault: ObjectFault) -> None:
        """See `EffortInstruments`."""
        self._retries.add(1, (verb, fault.value))

    def note_hedge(self, verb: str) -> None:
        """See `EffortInstruments`."""
        self._hedges.add(1, (verb,))

    def note_hedge_won(self, verb: str) -> None:
        """See `EffortInstruments`."""
        self._hedges_won.add(1, (verb,))

    def note_read(self, num_bytes: int) -> None:
        """Count bytes that were read and verified."""
        self._bytes.add(num_bytes, ("read",))

    def note_stored(self, num_bytes: int) -> None:
        """Count bytes that were stored."""
        self._bytes.add(num_bytes, ("stored",))

    @property
    def stored_bytes(self) -> int:
        """Bytes that were stored."""
        return int(self._bytes.value(("stored",)))

    def note_groups(self, outcome: str, count: int) -> None:
        """Count groups that were offered: stored, exists, rejected, pending_full, incomplete..."""
        if count:
            self._groups.add(count, (outcome,))

    def note_lookup(self, outcome: str) -> None:
        """Count a prefix that was looked for: found, absent, failed."""
        self._lookups.add(1, (outcome,))

    def note_deleted(self, reason: str, count: int) -> None:
        """Count objects that were deleted."""
        if count:
            self._deleted.add(count, (reason,))

"""Which objects of a bucket are garbage, and their removal; what `kvx gc` does."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from kvx.cache.s3.inventory import Verdict
from kvx.cache.s3.names import FORMAT_VERSION
from kvx.cache.s3.store import DELETE_BATCH_MAX

if TYPE_CHECKING:
    from collections.abc import Callable

    from kvx.cache.s3.inventory import Finding, Inventory

_GARBAGE = frozenset({Verdict.EXPIRED, Verdict.DAMAGED, Verdict.OLD})


@dataclass(frozen=True, slots=True)
class SweepRules:
    """What is garbage.

    Attributes:
        now_s: Unix time.
        older_than_s: Age from which every object is; None for none.
        has_other_versions: Whether objects of other format versions are.
        is_deleting: Whether it is deleted, too.
        public_id: (16 bytes) of the only namespace to look at; empty for all.
    """

    now_s: float
    older_than_s: float | None = None
    has_other_versions: bool = False
    is_deleting: bool = False
    public_id: bytes = b""

    @property
    def within(self) -> str:
        """How names go on behind the prefix, as far as these rules need them listed."""
        if self.public_id:
            return f"v{FORMAT_VERSION}/{self.public_id.hex()}/"
        return "v" if self.has_other_versions else f"v{FORMAT_VERSION}/"

    def dooms(self, verdict: Verdict) -> bool:
        """Return whether objects of this kind are garbage."""
        return verdict in _GARBAGE or (verdict is Verdict.OTHER_VERSION and self.has_other_versions)


@dataclass(slots=True)
class Tally:
    """How many objects, and how large they are together."""

    num_objects: int = 0
    size_bytes: int = 0

    def add(self, size_bytes: int) -> None:
        """Count one object."""
        self.num_objects += 1
        self.size_bytes += size_bytes


@dataclass(slots=True)
class SweepTotals:
    """What a sweep has done so far; right at any moment, after a failure too.

    Attributes:
        by_verdict: All objects looked at.
        doomed: Those of them that are garbage.
        deleted: Those of these that were deleted.
    """

    by_verdict: dict[Verdict, Tally] = field(
        default_factory=lambda: {verdict: Tally() for verdict in Verdict}
    )
    doomed: Tally = field(default_factory=Tally)
    deleted: Tally = field(default_factory=Tally)


async def sweep(
    inventory: Inventory,
    rules: SweepRules,
    totals: SweepTotals,
    *,
    notify: Callable[[Finding], None] = lambda _: None,
) -> None:
    """Look at every object and delete what is garbage.

    Holds one page of names at a time, whatever the number of objects.

    Args:
        inventory: The bucket.
        rules: What is garbage.
        totals: Where it is counted.
        notify: Told of each object once it was judged.

    Raises:
        ObjectError: A call failed, and failed again. What was counted as deleted is.
    """
    async for page in inventory.pages(rules.within):
        findings = await inventory.over(
            page,
            lambda one: inventory.judge(one, now_s=rules.now_s, older_than_s=rules.older_than_s),
        )
        for finding in findings:
            totals.by_verdict[finding.verdict].add(finding.facts.size_bytes)
            notify(finding)
        doomed = [finding.facts for finding in findings if rules.dooms(finding.verdict)]
        for facts in doomed:
            totals.doomed.add(facts.size_bytes)
        if not rules.is_deleting:
            continue
        for start in range(0, len(doomed), DELETE_BATCH_MAX):
            batch = doomed[start : start + DELETE_BATCH_MAX]
            await inventory.delete([facts.name for facts in batch])
            for facts in batch:
                totals.deleted.add(facts.size_bytes)

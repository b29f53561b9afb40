"""What became of one prompt: which tokens came from which tier, and why not more."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

import kvx

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence


@dataclass(frozen=True, slots=True)
class PlannedBlock:
    """A block that is to be loaded.

    Attributes:
        key: vLLM's.
        begin: Its first token in the prompt.
        end: The token behind it.
        tier: Where it was found.
    """

    key: bytes
    begin: int
    end: int
    tier: kvx.TierKind


@dataclass(slots=True)
class Account:
    """Kept from the first lookup until the request is gone. A load that failed is taken off.

    Attributes:
        num_computed: Tokens that the engine had itself.
        planned: What is to be loaded, of the last lookup.
        failures: Why blocks did not come, by vLLM's key; of all lookups.
        is_settled: The prompt was scheduled: what comes later is another story.
    """

    num_computed: int = 0
    planned: list[PlannedBlock] = field(default_factory=list)
    failures: dict[bytes, kvx.MissReason] = field(default_factory=dict)
    is_settled: bool = False
    _served: dict[bytes, kvx.TierKind] = field(default_factory=dict)
    _reason: kvx.MissReason = kvx.MissReason.HIT

    def begin(self, num_computed: int) -> None:
        """Start over: the scheduler looks the prompt up, maybe once more."""
        if not self.is_settled:
            self.num_computed, self.planned = num_computed, []
            self._served.clear()

    def plan(self, blocks: Sequence[PlannedBlock]) -> None:
        """Note what is to be loaded."""
        if not self.is_settled:
            self.planned = list(blocks)

    def fail(self, key: bytes, reason: kvx.MissReason) -> bool:
        """Note a block that did not come; False where another rank has said so already."""
        is_new = key not in self.failures
        self.failures.setdefault(key, reason)
        return is_new

    def divert(self, key: bytes, tier: kvx.TierKind) -> None:
        """Note a block that came from another tier than it was found in; the slowest counts."""
        if not self.is_settled:
            self._served[key] = max(tier, self._served.get(key, tier))

    def settle(self, locations: Iterable[tuple[int, int, kvx.Location]]) -> bool:
        """Note that the prompt is scheduled now; False when it was before.

        Args:
            locations: Of each group: its first block that was asked for, the tokens of a block,
                and where they were.
        """
        if self.is_settled:
            return False
        self.is_settled = True
        failed = [block for block in self.planned if block.key in self.failures]
        if failed:
            self._reason = self.failures[min(failed, key=lambda block: block.begin).key]
        else:
            end = max((block.end for block in self.planned), default=self.num_computed)
            # What failed before is not even looked for again.
            failed_before = next(iter(self.failures.values()), kvx.MissReason.HIT)
            self._reason = _why_it_ended(end, locations) or failed_before
        return True

    @property
    def reason(self) -> kvx.MissReason:
        """Why the cached prefix ended; HIT when every block of the prompt was there."""
        return self._reason

    def tokens(self) -> dict[str, int]:
        """Return the tokens that were loaded, by tier.

        A token that blocks of several groups cover counts for the slowest of their tiers, one that
        no block covers, as a sliding window or a state does without, for the slowest of all.
        """
        end = max((block.end for block in self.planned), default=0)
        # vLLM computes from the first block on that did not come.
        end = min(
            [end, *(block.begin for block in self.planned if block.key in self.failures)]
        )  # fmt: skip
        loaded = [block for block in self.planned if block.begin < end]
        if not loaded or end <= self.num_computed:
            return {}
        tiers = np.zeros(end, np.uint8)
        for block in loaded:
            covered = tiers[block.begin : block.end]
            np.maximum(covered, np.uint8(self._tier_of(block)), out=covered)
        tiers[tiers == kvx.TierKind.NONE] = max(map(self._tier_of, loaded))
        counts = Counter(tiers[self.num_computed :].tolist())
        return {kvx.TierKind(tier).name.lower(): count for tier, count in counts.items()}

    def _tier_of(self, block: PlannedBlock) -> kvx.TierKind:
        return self._served.get(block.key, block.tier)

    def told(self, tiers: Iterable[str]) -> dict[str, object]:
        """Return what the response of the request says of it.

        Args:
            tiers: Those there are, which are named even with no tokens.
        """
        details: Mapping[str, int] = {
            "gpu": self.num_computed, **dict.fromkeys(tiers, 0), **self.tokens(),
        }  # fmt: skip
        is_whole = self._reason is kvx.MissReason.HIT
        return {
            "cached_tokens_details": dict(details),
            "miss_reason": None if is_whole else self._reason.name.lower(),
            "load_failures": dict(Counter(one.name.lower() for one in self.failures.values())),
        }


def _why_it_ended(end: int, locations: Iterable[tuple[int, int, kvx.Location]]) -> kvx.MissReason:
    """Return the reason of the group that ended the prefix; another's, if none did just there."""
    others = kvx.MissReason.HIT
    for first, tokens, location in locations:
        missing = np.flatnonzero(location.tiers == kvx.TierKind.NONE)
        if not len(missing):
            continue
        if (first + int(missing[0])) * tokens == end:
            return location.reason
        others = others or location.reason
    return others

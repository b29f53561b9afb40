"""Contestants measured in turn, so that whatever else the machine does hits all of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from kvx_bench.row import GB, Row, median

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from kvx_bench.row import Sample


@dataclass(frozen=True, slots=True)
class Contest:
    """What every contestant needed in every round.

    Attributes:
        num_bytes: That each of them moved in a round.
        samples: By name, a sample a round.
    """

    num_bytes: int
    samples: Mapping[str, list[Sample]]

    def gb_per_s(self, name: str) -> float:
        """Return the median rate."""
        return self.num_bytes / GB / median(sample.wall_s for sample in self.samples[name])

    def cpu_s_per_gb(self, name: str) -> float:
        """Return the median cost."""
        return median(sample.cpu_s for sample in self.samples[name]) / (self.num_bytes / GB)

    def ratio(self, name: str, limit: str) -> float:
        """Return the median over the rounds of how much faster `name` was than `limit`."""
        pairs = zip(self.samples[name], self.samples[limit], strict=True)
        return median(theirs.wall_s / mine.wall_s for mine, theirs in pairs)

    def row(self, key: str, name: str, *limits: str, note: str = "") -> Row:
        """Return a contestant's row.

        Args:
            key: Of the row.
            name: The contestant.
            limits: What it is compared with, first what it is judged by; who did not take part is
                left out.
            note: What else the reader must know.
        """
        present = [one for one in limits if one in self.samples]
        limit = present[0] if present else ""
        return Row(
            key,
            gb_per_s=self.gb_per_s(name),
            limit=self.gb_per_s(limit) if limit else None,
            ratio=self.ratio(name, limit) if limit else None,
            limit_name=limit,
            ratios={one: self.ratio(name, one) for one in present[1:]},
            cpu_s_per_gb=self.cpu_s_per_gb(name),
            note=note,
        )


def hold(
    contestants: Mapping[str, Callable[[], Sample]], num_bytes: int, *, rounds: int
) -> Contest:
    """Let everybody warm up, then run everybody once a round.

    Every second round runs backwards: what one leaves in the caches is not always the same one's
    to find.
    """
    for run in contestants.values():
        run()
    samples: dict[str, list[Sample]] = {name: [] for name in contestants}
    forwards = list(contestants.items())
    for number in range(rounds):
        for name, run in forwards[::-1] if number % 2 else forwards:
            samples[name].append(run())
    return Contest(num_bytes, samples)

"""Whatever happens to a peer, transfers end in time, write nothing late, and leave nothing."""

from __future__ import annotations

import random

import pytest

from tests.transfer.faults.matrix import Extent, all_of_it, over_link, over_way
from tests.transfer.faults.trial import Tally
from tests.transfer.faults.victim import WAYS, Way

SHORT = Extent(rounds=1, storm=120, has_sample=True)
LONG = Extent(rounds=4, storm=2600)


@pytest.fixture
def seed() -> int:
    """Return a seed that a failure shows."""
    chosen = random.SystemRandom().randrange(1 << 32)
    print(f"seed {chosen}")  # noqa: T201 - pytest shows it with the failure
    return chosen


@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.name)
def test_short(way: Way, seed: int) -> None:
    tally = Tally()
    over_way(way, SHORT, random.Random(seed), tally)
    if way.name in tally.skipped:
        pytest.skip(tally.skipped[way.name])
    tally.check()
    assert tally.trials, "nothing was tried"


def test_short_over_a_link(seed: int) -> None:
    tally = Tally()
    over_link(SHORT, random.Random(seed), tally)
    if tally.skipped:
        pytest.skip(next(iter(tally.skipped.values())))
    tally.check()
    assert tally.trials, "nothing was tried"


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_ten_thousand_faults(seed: int) -> None:
    tally = all_of_it(LONG, seed, print)
    tally.check()
    assert tally.faults_done >= 10_000

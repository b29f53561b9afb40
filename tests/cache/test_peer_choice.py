"""Whom to ask for which block: every block somebody has is asked for, once, of the best."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as some

from kvx.cache.peer.choice import NOBODY, Candidate, choose

BYTES = 1000


def peer(
    warm: list[int], cold: list[int], *, is_near: bool = True, load: int = 0, count: int = 8
) -> Candidate:
    rows = np.arange(count)
    return Candidate(np.isin(rows, warm), np.isin(rows, cold), is_near, load)


def chosen(*candidates: Candidate, count: int = 8) -> list[int]:
    return [int(one) for one in choose(candidates, count, BYTES)]


@pytest.mark.parametrize(
    ("candidates", "expected"),
    [
        ([], [NOBODY] * 8),
        ([peer([0, 1], [2])], [0, 0, 0] + [NOBODY] * 5),
        # Memory elsewhere before a disk here.
        ([peer([], range(8)), peer(range(8), [], is_near=False)], [1] * 8),
        # This host before another one.
        ([peer(range(8), [], is_near=False), peer(range(8), [])], [1] * 8),
        # Equals share, also when one alone has some of it.
        ([peer(range(8), []), peer(range(8), [])], [0] * 4 + [1] * 4),
        ([peer(range(8), []), peer(range(4), [])], [1] * 4 + [0] * 4),
        # Who is busy gets less, or nothing.
        ([peer(range(8), [], load=4 * BYTES), peer(range(8), [])], [1] * 6 + [0] * 2),
        ([peer(range(8), [], load=99 * BYTES), peer(range(8), [])], [1] * 8),
    ],
)
def test_cases(candidates: list[Candidate], expected: list[int]) -> None:
    assert chosen(*candidates) == expected


masks = some.lists(some.booleans(), min_size=20, max_size=20)
peers = some.lists(
    some.builds(
        lambda warm, cold, near, load: Candidate(np.array(warm), np.array(cold), near, load),
        masks, masks, some.booleans(), some.integers(0, 30 * BYTES),
    ),
    max_size=5,
)  # fmt: skip


@given(peers)
def test_every_block_that_is_held_is_asked_of_one_that_holds_it(found: list[Candidate]) -> None:
    result = chosen(*found, count=20)
    for row, one in enumerate(result):
        holders = [p for p, who in enumerate(found) if who.warm[row] or who.cold[row]]
        assert one in holders if holders else one == NOBODY
        if one == NOBODY:
            continue
        ranks = [(not found[p].warm[row], not found[p].is_near) for p in holders]
        assert (not found[one].warm[row], not found[one].is_near) == min(ranks)

"""The matrix: every fault in every state over every way, in a short and in a long form."""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from unittest.mock import patch

from tests.transfer.faults import links
from tests.transfer.faults.ground import Ground
from tests.transfer.faults.injections import storm
from tests.transfer.faults.process_faults import FAULTS, STATES, Fault, run
from tests.transfer.faults.scene import tell_lies
from tests.transfer.faults.trial import Tally
from tests.transfer.faults.victim import WAYS, Way, why_not

Progress = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Extent:
    """How much of it.

    Attributes:
        rounds: How often each fault strikes in each state.
        storm: Small faults injected over each way.
        has_sample: Whether each fault strikes in two states only, chosen by the seed.
    """

    rounds: int
    storm: int
    has_sample: bool = False


def over_way(way: Way, extent: Extent, rng: random.Random, tally: Tally) -> None:
    """Fill in the cells of one way."""
    why = why_not(way)
    if why:
        tally.skipped[way.name] = why
        return
    with patch.dict(os.environ, dict(way.environment)), Ground(way) as ground:
        _strike(ground, FAULTS, extent, rng, tally)
        tally.add(storm(ground, extent.storm, rng), extent.storm)
        tally.leaks[way.name] = ground.leaks()


def over_link(extent: Extent, rng: random.Random, tally: Tally) -> None:
    """Fill in the cells of a link between two namespaces."""
    why = links.why_no_links()
    if why:
        tally.skipped["tcp, a link"] = why
        return
    with links.Link(), Ground(links.way()) as ground:
        _strike(ground, links.LINK_FAULTS, extent, rng, tally)
        tally.leaks[ground.way.name] = ground.leaks()


def all_of_it(extent: Extent, seed: int, progress: Progress) -> Tally:
    """Fill in the whole matrix."""
    tally = Tally()
    for way in WAYS:
        progress(f"{way.name}")
        over_way(way, extent, random.Random(f"{seed} {way.name}"), tally)
    progress("a link")
    over_link(extent, random.Random(f"{seed} link"), tally)
    for name in ("unix", "tcp"):
        progress(f"lies over {name}")
        told = tell_lies(name)
        tally.add(told, len(told))
    return tally


def _strike(
    ground: Ground, faults: Sequence[Fault], extent: Extent, rng: random.Random, tally: Tally
) -> None:
    for _ in range(extent.rounds):
        for fault in faults:
            states = rng.sample(STATES, 2) if extent.has_sample else STATES
            for state in states:
                ground.has_thread = rng.random() < 0.5
                tally.add(run(ground, fault, state, rng))

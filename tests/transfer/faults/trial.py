"""What is noted of one fault, and what many of them amount to."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from tests.sim.stalls import LATE_S


@dataclass(frozen=True, slots=True)
class Trial:
    """One fault, and how what was under way has ended.

    Attributes:
        way: How the bytes went: shm, foreign, unix, tcp, nixl.
        fault: What was done.
        state: What was under way then.
        outcome: ``done``, or the name of the error.
        over_s: From the deadline to the end; negative when it ended before.
        late_writes: Blocks that changed after the transfer had quiesced.
        wrong_blocks: Blocks that were counted as arrived and hold other bytes.
        peer: State of the peer that was reported afterwards; empty where it was not looked at.
        is_stuck: Whether it was still not quiesced when everybody was well again.
    """

    way: str
    fault: str
    state: str
    outcome: str
    over_s: float
    late_writes: int = 0
    wrong_blocks: int = 0
    peer: str = ""
    is_stuck: bool = False


@dataclass(slots=True)
class Leaks:
    """What was left behind by many faults.

    Attributes:
        running: Transfers of ours, by the core.
        quarantined: Transfers that have not quiesced.
        served: Transfers of peers.
        descriptors: Of files, more than before.
        rss_bytes: Of memory, more than after the first quarter of the faults.
    """

    running: int = 0
    quarantined: int = 0
    served: int = 0
    descriptors: int = 0
    rss_bytes: int = 0

    @property
    def total(self) -> int:
        """How many things, memory apart."""
        return self.running + self.quarantined + self.served + self.descriptors

    def __str__(self) -> str:
        """Return a text for people."""
        return (
            f"running {self.running}, quarantined {self.quarantined}, served {self.served}, "
            f"descriptors {self.descriptors}, memory {self.rss_bytes / 1e6:+.1f} MB"
        )


@dataclass(slots=True)
class Tally:
    """The trials of some cells, and what they left behind.

    Attributes:
        trials: Transfers, and how they ended.
        faults_done: Faults that were injected; one may strike several transfers.
        leaks: What was left, by way.
        skipped: Why a way was not tried.
    """

    trials: list[Trial] = field(default_factory=list)
    faults_done: int = 0
    leaks: dict[str, Leaks] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)

    def add(self, trials: Iterable[Trial], faults: int = 1) -> None:
        """Count trials, and how many faults they are of."""
        self.trials += trials
        self.faults_done += faults

    def ways(self) -> list[str]:
        """Return the ways, in the order they were first met."""
        return list(dict.fromkeys(trial.way for trial in self.trials))

    def faults(self) -> list[str]:
        """Return the faults, in the order they were first met."""
        return list(dict.fromkeys(trial.fault for trial in self.trials))

    def of(self, way: str | None = None, fault: str | None = None) -> list[Trial]:
        """Return the trials of a way, of a fault, or of both."""
        return [
            trial
            for trial in self.trials
            if way in (None, trial.way) and fault in (None, trial.fault)
        ]

    def check(self) -> None:
        """Raise AssertionError for what must never be."""
        for trial in self.trials:
            assert not trial.late_writes, f"written after its end: {trial}"
            assert not trial.wrong_blocks, f"wrong bytes counted as arrived: {trial}"
            assert not trial.is_stuck, f"never quiesced: {trial}"
        for way, fault in itertools.product(self.ways(), self.faults()):
            # Of those that ran out of time: the others would make it look better than it is.
            late_s = percentile(overtimes(self.of(way, fault)), 0.99)
            assert late_s <= LATE_S, (
                f"{fault}, {way}: p99 is {late_s * 1e3:.0f} ms over the deadline"
            )
        for name, leaks in self.leaks.items():
            assert not leaks.total, f"left behind over {name}: {leaks}"


def percentile(values: Sequence[float], share: float) -> float:
    """Return the smallest value that at least `share` of them do not exceed; 0 of none."""
    if not values:
        return 0.0
    ordered = sorted(values)
    place = max(0, -int(-len(ordered) * share // 1) - 1)
    return ordered[place]


def overtimes(trials: Iterable[Trial]) -> list[float]:
    """Return how long after its deadline each trial ended that did not end before."""
    return [trial.over_s for trial in trials if trial.over_s > 0.0]


def in_words(trials: Iterable[Trial], most: int = 3) -> str:
    """Return how trials ended, the most frequent first."""
    counts = Counter(trial.outcome for trial in trials)
    return ", ".join(f"{outcome} {count}" for outcome, count in counts.most_common(most))

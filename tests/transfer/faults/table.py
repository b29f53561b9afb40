"""Runs the matrix and writes docs/guides/faults.md: `python -m tests.transfer.faults.table`."""

from __future__ import annotations

import argparse
import os
import platform
import random
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

from tests.transfer.faults.matrix import Extent, all_of_it
from tests.transfer.faults.process_faults import STATES
from tests.transfer.faults.trial import Tally, Trial, in_words, overtimes, percentile
from tests.transfer.faults.victim import WAYS

_PAGE = Path(__file__).parents[3] / "docs" / "guides" / "faults.md"
_TEXT = Path(__file__).with_name("page.md").read_text()


def _cell(trials: list[Trial]) -> str:
    late = overtimes(trials)
    over = " / ".join(f"{percentile(late, share) * 1e3:.1f}" for share in (0.5, 0.99, 1.0))
    return (
        f"{len(trials)} | {in_words(trials)} | {len(late)} | {over if late else '-'} | "
        f"{sum(trial.late_writes for trial in trials)} | "
        f"{sum(trial.wrong_blocks for trial in trials)}"
    )


def _table(tally: Tally) -> str:
    rows = ["| fault | way | trials | ended as | at the deadline | over | late | wrong |"]
    rows.append("|" + "---|" * 8)
    for fault in tally.faults():
        for way in tally.ways():
            trials = tally.of(way, fault)
            if trials:
                rows.append(f"| {fault} | {way} | {_cell(trials)} |")
    rows += [f"| all | {way} | {_cell(tally.of(way))} |" for way in tally.ways()]
    return "\n".join(rows)


def _states(tally: Tally) -> str:
    rows = ["| fault | reported |", "|---|---|"]
    for fault in tally.faults():
        said = Counter(trial.peer for trial in tally.of(fault=fault) if trial.peer)
        if said:
            words = ", ".join(f"{state} {count}" for state, count in said.most_common())
            rows.append(f"| {fault} | {words} |")
    return "\n".join(rows)


def _leaks(tally: Tally) -> str:
    return "\n".join(f"- {way}: {leaks}" for way, leaks in tally.leaks.items())


def _machine() -> str:
    model = next(
        (
            line.partition(":")[2].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if line.startswith("model name")
        ),
        platform.machine(),
    )
    commit = subprocess.run(
        ("git", "rev-parse", "--short", "HEAD"), capture_output=True, text=True, check=False
    ).stdout.strip()
    return (
        f"{model}, {os.cpu_count()} CPUs, shared with other work; Linux {platform.release()}, "
        f"Python {platform.python_version()}; kvx at {commit}."
    )


def page(tally: Tally, extent: Extent, seed: int, took_s: float) -> str:
    """Return the text of the page."""
    late = sum(trial.late_writes for trial in tally.trials)
    wrong = sum(trial.wrong_blocks for trial in tally.trials)
    stuck = sum(trial.is_stuck for trial in tally.trials)
    left = sum(leaks.total for leaks in tally.leaks.values())
    ways = [way.name for way in WAYS if way.name in tally.leaks]
    lies = sum(trial.fault == "peer lies" for trial in tally.trials)
    large = tally.faults_done - lies - extent.storm * len(ways)
    summary = (
        f"{tally.faults_done} faults were injected, which struck {len(tally.trials)} transfers, in "
        f"{took_s / 60:.0f} minutes; {large} of them were done to processes and links. {late} late "
        f"writes, {wrong} blocks with wrong bytes, {stuck} transfers that did not quiesce, {left} "
        "things left behind."
    )
    skipped = "".join(f"Not tried: {way} ({why}).\n\n" for way, why in tally.skipped.items())
    return _TEXT.format(
        rounds=extent.rounds, storm=extent.storm, seed=seed, summary=summary,
        table=_table(tally), states=_states(tally), leaks=_leaks(tally), skipped=skipped,
        machine=_machine(),
    )  # fmt: skip


def _tell(what: str) -> None:
    sys.stderr.write(f"{what}\n")


def main() -> None:
    """Run it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=4, help=f"of {len(STATES)} states")
    parser.add_argument("--storm", type=int, default=2600, help="small faults over each way")
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(1 << 32))
    chosen = parser.parse_args()
    sys.stderr.write(f"seed {chosen.seed}\n")
    extent = Extent(chosen.rounds, chosen.storm)
    began = time.monotonic()
    tally = all_of_it(extent, chosen.seed, _tell)
    _PAGE.write_text(page(tally, extent, chosen.seed, time.monotonic() - began))
    tally.check()


if __name__ == "__main__":
    main()

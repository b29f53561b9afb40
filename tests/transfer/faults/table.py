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
_TEXT = """# Faults

What becomes of a transfer when its peer dies, freezes, restarts, takes its memory away or lies, or when the link between
them fails. Every transfer ends, at its deadline at the latest; nothing is written into memory after that; nothing that did
not arrive is counted as arrived; nothing is left behind.

This page is written by a run of the tests, not by hand:

    python -m tests.transfer.faults.table --rounds {rounds} --storm {storm} --seed {seed}

## What is a fault

| fault | what is done |
|---|---|
| killed, frozen | the peer's process gets SIGKILL; SIGSTOP, and SIGCONT when the transfer has ended |
| restarted | it is killed, and another process of the same name takes its place |
| deregisters, frees memory | the peer closes the registration and fills the memory with something else at once; unmaps it, too |
| link drops all, link throttled | between two network namespaces: nft drops every packet; tc (tbf) lets 8 Mbit/s through |
| peer lies | a peer that knows the key answers by hand: pieces too long, out of order, twice or for nobody; wrong trailers, sums, codes and ends; a done too early or for what was not asked; half a piece and silence; a socket that is never read |
| cancelled, short deadline | a transfer is cancelled at a random moment; has 0.02 to 3 ms |
| lease revoked, lease expires | the owner takes the lease back at a random moment; it lasts 0.5 to 4 ms |
| connection dropped | the peer closes every connection at a random moment |
| deregistered here | the initiator closes its own registration at a random moment |
| let go of | nobody holds the transfer any more |

Those of processes and links strike while a peer is idle, is being connected with, serves a read or a write of 16 MiB, or a batch of small
ones, or while the initiator is closing; at a random moment of each. The small ones strike reads and writes of 64 KiB to 6 MiB,
one at a time or six at once. Initiator and peer are two processes on one machine.

| way | bytes go |
|---|---|
| shm | out of a mapped, sealed memfd |
| foreign | out of private memory, with process_vm_readv |
| unix, tcp | as verified pieces over a unix socket, over tcp |
| tcp, a link | over tcp between two network namespaces |

## What was found

{summary}

- *over*: from the deadline to the end, of those trials that did not end before it; p50 / p99 / max in ms. The bound is 100 ms
  at p99. It is measured by the thread that waits, or by a callback, so the machine's scheduling is in it.
- *late*: blocks that changed after the transfer had quiesced. Their memory is filled with a guard then, and looked at when the
  peer has gone on.
- *wrong*: blocks that are said to have arrived and hold other bytes than the sender's.

{table}

The states of a peer that were reported after a fault:

{states}

Left behind after all of it, by the counters of both agents and /proc of the initiator (memory: after the first quarter of the
small faults, to the end):

{leaks}

{skipped}## Machine

{machine}
"""


def _cell(trials: list[Trial]) -> str:
    late = overtimes(trials)
    over = " / ".join(f"{percentile(late, share) * 1e3:.1f}" for share in (0.5, 0.99, 1.0))
    return (
        f"{len(trials)} | {in_words(trials)} | {len(late)} | {over if late else '-'} | "
        f"{sum(trial.late_writes for trial in trials)} | "
        f"{sum(trial.wrong_blocks for trial in trials)}"
    )


def _table(tally: Tally) -> str:
    rows = [
        "| fault | way | trials | ended as | at the deadline | over | late | wrong |",
        "|" + "---|" * 8,
    ]
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
        f"{model}, {os.cpu_count()} CPUs, shared with other work; Linux {platform.release()}, Python "
        f"{platform.python_version()}; kvx at {commit}."
    )


def page(tally: Tally, extent: Extent, seed: int, took_s: float) -> str:
    """Return the text of the page."""
    stuck = sum(trial.is_stuck for trial in tally.trials)
    ways = [way.name for way in WAYS if way.name in tally.leaks]
    lies = sum(trial.fault == "peer lies" for trial in tally.trials)
    large = tally.faults_done - lies - extent.storm * len(ways)
    summary = (
        f"{tally.faults_done} faults were injected, which struck {len(tally.trials)} transfers, in "
        f"{took_s / 60:.0f} minutes; {large} of them "
        f"were done to processes and links. {sum(trial.late_writes for trial in tally.trials)} late "
        f"writes, {sum(trial.wrong_blocks for trial in tally.trials)} blocks with wrong bytes, {stuck} "
        "transfers that did not quiesce, "
        f"{sum(leaks.total for leaks in tally.leaks.values())} things left behind."
    )
    skipped = "".join(f"Not tried: {way} ({why}).\n\n" for way, why in tally.skipped.items())
    return _TEXT.format(
        rounds=extent.rounds, storm=extent.storm, seed=seed, summary=summary,
        table=_table(tally), states=_states(tally), leaks=_leaks(tally), skipped=skipped,
        machine=_machine(),
    )  # fmt: skip


def main() -> None:
    """Run it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--rounds", type=int, default=4, help=f"of each fault in {len(STATES)} states"
    )
    parser.add_argument("--storm", type=int, default=2600, help="small faults over each way")
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(1 << 32))
    chosen = parser.parse_args()
    print(f"seed {chosen.seed}", file=sys.stderr)
    extent = Extent(chosen.rounds, chosen.storm)
    began = time.monotonic()
    tally = all_of_it(extent, chosen.seed, lambda what: print(what, file=sys.stderr))
    _PAGE.write_text(page(tally, extent, chosen.seed, time.monotonic() - began))
    tally.check()


if __name__ == "__main__":
    main()

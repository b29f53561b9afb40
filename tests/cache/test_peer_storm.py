"""Seeded storms over caches that read from each other while they evict, drop and clear.

Block number n always has the same bytes, so whatever is served under its hash can be judged without
knowing what happened. Nothing may stay pinned, lent or on its way when the storm is over.
"""

from __future__ import annotations

import contextlib
import random
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cache.conftest import open_space
from tests.cache.peer_pair import metric, tier_of
from tests.cache.peer_process import BLOCK_BYTES, PeerProcess, Plan, _Actor
from tests.waiting import eventually

pytestmark = pytest.mark.usefixtures("runtime_directory")

NUM_BLOCKS = 96
SETTINGS = {"deadline_s": 0.3, "max_in_flight_bytes": 8 * BLOCK_BYTES, "publish_s": 0.002}
CONFIG = {"breaker": {"failures": 3, "reset_s": 0.2}}


@contextlib.contextmanager
def interrupted(process: PeerProcess, dice: random.Random, *, is_wanted: bool) -> Iterator[None]:
    """Stop a process for moments now and then."""
    over = threading.Event()

    def run() -> None:
        while is_wanted and not over.wait(dice.uniform(0.1, 0.6)):
            process.signal(signal.SIGSTOP)
            over.wait(dice.uniform(0.01, 0.5))
            process.signal(signal.SIGCONT)

    thread = threading.Thread(target=run)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
        process.signal(signal.SIGCONT)


def storm(seed: int, duration_s: float, tmp_path: Path, *, is_interrupted: bool) -> None:
    dice = random.Random(seed)
    shape = {"settings": SETTINGS, "config": CONFIG}
    owners = [
        Plan("a", nvme=tmp_path / "a", dram_blocks=24, **shape),  # type: ignore[arg-type]
        Plan("c", dram_blocks=40, listen=("tcp://127.0.0.1:0",), **shape),  # type: ignore[arg-type]
    ]
    with PeerProcess(owners[0]) as a, PeerProcess(owners[1]) as c:
        here = Plan("b", peers=(a.unix, c.tcp), dram_blocks=32, **shape)  # type: ignore[arg-type]
        with here.opened() as cache:
            assert eventually(lambda: len(tier_of(cache).sources) == 2)
            actor = _Actor(cache)
            a.tell("storm", seed + 1, duration_s, NUM_BLOCKS)
            c.tell("storm", seed + 2, duration_s, NUM_BLOCKS)
            with interrupted(c, dice, is_wanted=is_interrupted):
                count, wrong = actor.storm(seed, duration_s, NUM_BLOCKS)
                told = [a.hear(), c.hear()]
            assert wrong == 0, f"seed {seed}"
            assert [one[1] for one in told if isinstance(one, tuple)] == [0, 0], f"seed {seed}"
            text = cache.metrics.render()
            served = sum(
                metric(text, f'kvx_peer_read_blocks_total{{peer="{name}"}}') for name in "ac"
            )
            assert served > 10, f"seed {seed}: {count} operations here, {told} there"
            assert eventually(lambda: tier_of(cache).in_flight_bytes == 0)
            assert eventually(lambda: tier_of(cache).lent_bytes == 0)
            for other in (a, c):
                assert eventually(lambda other=other: other.ask("lent_bytes") == 0)
                assert eventually(lambda other=other: other.ask("pinned") == 0)
                other.ask("check")
            cache.check_integrity()
            # What peers are thought to hold comes to be what they do hold.
            space = open_space(cache)
            assert eventually(lambda: _agrees(a, c, tier_of(cache).known_blocks))
            assert space.dram_pool.index.stats()["pinned"] == 0


def _agrees(a: PeerProcess, c: PeerProcess, known: int) -> bool:
    held = sum(int(str(one.ask("num_held"))) for one in (a, c))
    # An eviction is told after the slot was given away: a block that was stored again in that very
    # moment is taken for gone, as docs/formats/events.md says. Never the other way round.
    return held - 4 <= known <= held


@pytest.mark.parametrize("is_interrupted", [False, True])
def test_a_short_storm(tmp_path: Path, *, is_interrupted: bool) -> None:
    storm(int(time.time()), 3.0, tmp_path, is_interrupted=is_interrupted)


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("seed", range(4))
def test_a_long_storm(seed: int, tmp_path: Path) -> None:
    storm(seed, 30.0, tmp_path, is_interrupted=seed % 2 == 1)

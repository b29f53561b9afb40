"""Eight threads of mixed verbs on a tiny cache: right bytes, no deadlock, nothing left held."""

from __future__ import annotations

import random
import threading
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import pytest

import kvx
from kvx.errors import StaleReference, TransferCancelled, TransferTimeout
from tests.cache.conftest import Opener, make_blocks, make_hashes, open_space
from tests.cache.faults import check_target, injected, sample, wait_until

if TYPE_CHECKING:
    import numpy.typing as npt

THREADS = 8
NUM_BLOCKS = 96
HASHES = make_hashes(NUM_BLOCKS)
SIZES = (4096, 12288)
# How different the blocks of the namespaces are that share hashes.
FIRST = {"a": 0, "b": 10_000}


@dataclass(slots=True)
class Worker:
    """One thread's random verbs; keeps what went wrong for the test to raise."""

    cache: kvx.TieredCache
    seed: int
    end_s: float
    sources: dict[tuple[str, int], npt.NDArray[np.uint8]]
    errors: list[BaseException] = field(default_factory=list)
    num_steps: int = 0
    num_served: int = 0

    def run(self) -> None:
        """Go on until the time is up or something is wrong."""
        rng = random.Random(f"worker {self.seed}")
        try:
            while time.monotonic() < self.end_s:
                self._step(rng)
                self.num_steps += 1
        except BaseException as error:  # noqa: BLE001 - the test raises it
            self.errors.append(error)

    def _step(self, rng: random.Random) -> None:
        salt, size = rng.choice(sorted(FIRST)), rng.choice(SIZES)
        space = open_space(self.cache, block_bytes=size, salt=salt)
        first = rng.randrange(NUM_BLOCKS - 12)
        rows = slice(first, first + rng.randint(1, 12))
        verb = rng.choices(
            ("offload", "onboard", "match", "prefetch", "drop", "lease", "pin", "cancel", "flush"),
            (30, 30, 10, 8, 6, 6, 4, 5, 1),
        )[0]
        if verb == "offload":
            space.offload(HASHES[rows], self.sources[salt, size][rows]).wait()
        elif verb == "onboard":
            self._onboard(space, salt, rows)
        elif verb == "match":
            space.match(HASHES[rows])
        elif verb == "prefetch":
            space.prefetch(HASHES[rows]).wait()
        elif verb == "drop":
            space.drop(HASHES[rows])
        elif verb == "lease":
            self._lease(space, salt, rows)
        elif verb == "pin":
            space.pin(HASHES[rows])
            space.unpin(HASHES[rows])
        elif verb == "cancel":
            self._cancel(space, salt, rows)
        else:
            self.cache.flush(5.0)

    def _onboard(self, space: kvx.CacheSpace, salt: str, rows: slice) -> None:
        target = np.full((rows.stop - rows.start, space.block_bytes), 7, np.uint8)
        result = space.onboard(HASHES[rows], target).wait()
        check_target(space, result, target, first=FIRST[salt] + rows.start)
        self.num_served += result.num_blocks

    def _lease(self, space: kvx.CacheSpace, salt: str, rows: slice) -> None:
        wanted = self.sources[salt, space.block_bytes][rows]
        with space.lease(HASHES[rows]) as lease:
            for place in range(len(lease)):
                view = lease.view(place).copy()
                try:
                    lease.check()
                except StaleReference:
                    continue
                assert (view == wanted[place]).all(), "a leased block changed"

    def _cancel(self, space: kvx.CacheSpace, salt: str, rows: slice) -> None:
        source = self.sources[salt, space.block_bytes][rows]
        target = np.full_like(source, 7)
        transfer = space.onboard(HASHES[rows], target, deadline_s=0.01)
        transfer.cancel()
        try:
            result = transfer.wait()
        except (TransferCancelled, TransferTimeout):
            assert transfer.result is not None
            result = transfer.result
        served = result.reasons == kvx.MissReason.HIT
        assert (target[served] == source[served]).all(), "wrong bytes in a cancelled transfer"


def check_threads(open_cache: Opener, duration_s: float, *, has_faults: bool, seed: int) -> None:
    """Let the workers loose on one cache and look at what they leave behind."""
    failpoints, faults = injected()
    cache = open_cache(
        dram={"capacity": "512KiB", "extent": "64KiB"},
        nvme={"capacity": "1MiB", "extent": "128KiB", "durability": "batch"},
        faults=faults,
        breaker={"failures": 20, "reset_s": 0.01},
    )
    if has_faults:
        for action in ("eio", "flip", "short", "delay"):
            failpoints.set("read", action, probability=0.02, seed=seed, delay_s=0.005)
            failpoints.set("write", action, probability=0.02, seed=seed, delay_s=0.005)
    sources = {
        (salt, size): make_blocks(NUM_BLOCKS, first=first, block_bytes=size)
        for salt, first in FIRST.items()
        for size in SIZES
    }
    end_s = time.monotonic() + duration_s
    workers = [Worker(cache, seed * 100 + i, end_s, sources) for i in range(THREADS)]
    threads = [threading.Thread(target=worker.run, daemon=True) for worker in workers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(duration_s + 20.0)
        assert not thread.is_alive(), f"seed {seed}: a thread hangs"
    failures = [error for worker in workers for error in worker.errors]
    if failures:
        raise AssertionError(f"seed {seed}: {len(failures)} threads failed") from failures[0]
    if not has_faults:
        # Checksums would hide that a slot had two users; nothing else may damage a block here.
        lines = cache.metrics.render().splitlines()
        assert not [line for line in lines if line.startswith("kvx_corrupt_blocks_total")]
    failpoints.clear()
    assert cache.flush(10.0)
    wait_until(lambda: sample(cache, "kvx_unsettled_jobs") == 0)
    cache.check_integrity()
    for tier in ("dram", "nvme"):
        stats = cache.stats()[tier]
        held = {name: stats[name] for name in ("pinned", "reserved", "doomed", "leases")}
        assert not any(held.values()), f"seed {seed}, {tier}: {held}"
    assert all(worker.num_steps > 10 for worker in workers)
    assert sum(worker.num_served for worker in workers) > 100
    last = Worker(cache, seed, 0.0, sources)
    for salt in FIRST:
        for size in SIZES:
            space = open_space(cache, block_bytes=size, salt=salt)
            last._onboard(space, salt, slice(0, NUM_BLOCKS))


@pytest.mark.parametrize("has_faults", [False, True])
def test_threads(open_cache: Opener, has_faults: bool) -> None:
    check_threads(open_cache, 2.0, has_faults=has_faults, seed=1)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(2, 6))
@pytest.mark.parametrize("has_faults", [False, True])
def test_threads_for_longer(open_cache: Opener, has_faults: bool, seed: int) -> None:
    check_threads(open_cache, 15.0, has_faults=has_faults, seed=seed)

"""A failing device: misses with the right reason, never wrong bytes, and serving goes on."""

from __future__ import annotations

import ctypes
import os
import random
import subprocess
from typing import TYPE_CHECKING

import numpy as np
import pytest

import kvx
from kvx.cache.assembly import FaultInjection
from kvx_ext import _core
from tests.cache.conftest import BLOCK_BYTES, Opener, make_blocks, make_hashes, open_space
from tests.cache.crash_load import Shape, judge, step
from tests.cache.faults import (
    DRAM_BLOCKS,
    FLOOD_FIRST,
    flood,
    injected,
    onboard,
    put_on_nvme,
    sample,
    wait_until,
)

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

COUNT = 40
REASON = kvx.MissReason
LASTING = {"failures": 100_000}


@pytest.mark.parametrize(
    ("action", "reason"),
    [
        ("eio", REASON.TIER_DOWN),
        ("enospc", REASON.TIER_DOWN),
        ("short", REASON.CORRUPT),
        ("flip", REASON.CORRUPT),
        ("drop", REASON.CORRUPT),
    ],
)
def test_bad_reads_are_misses_and_dram_is_served(
    open_cache: Opener, action: str, reason: kvx.MissReason
) -> None:
    failpoints, faults = injected()
    space = open_space(cache := open_cache(faults=faults, breaker=LASTING))
    put_on_nvme(cache, space, COUNT)
    in_dram = make_hashes(COUNT, first=FLOOD_FIRST + 2 * DRAM_BLOCKS - 64)
    failpoints.set("read", action, seed=3)
    target = np.full((2 * COUNT, BLOCK_BYTES), 7, np.uint8)
    result = space.onboard(np.concatenate([make_hashes(COUNT), in_dram]), target).wait()
    assert (result.reasons[:COUNT] == reason).all()
    assert (result.reasons[COUNT:] == REASON.HIT).all()
    served = make_blocks(COUNT, first=FLOOD_FIRST + 2 * DRAM_BLOCKS - 64)
    assert (target[COUNT:] == served).all()
    assert failpoints.hits()[action] == COUNT
    name = reason.name.lower()
    assert sample(cache, "kvx_misses_total", verb="onboard", reason=name) == COUNT
    is_damage = reason is REASON.CORRUPT
    assert sample(cache, "kvx_corrupt_blocks_total", tier="nvme") == COUNT * is_damage
    failpoints.clear()
    # Damage is forgotten, for good; a failed read says nothing about the block.
    assert onboard(space, make_hashes(COUNT)).num_blocks == COUNT * (not is_damage)
    cache.check_integrity()


@pytest.mark.parametrize("action", ["eio", "enospc", "short"])
def test_failed_writes_leave_blocks_in_dram(open_cache: Opener, action: str) -> None:
    failpoints, faults = injected()
    space = open_space(cache := open_cache(faults=faults, breaker=LASTING))
    failpoints.set("write", action)
    space.offload(make_hashes(COUNT), make_blocks(COUNT)).wait()
    assert cache.flush(10.0), "what cannot be written must not stay dirty for ever"
    assert sample(cache, "kvx_flushed_blocks_total", outcome="tier_down") == COUNT
    assert cache.stats()["nvme"]["committed"] == 0
    assert onboard(space, make_hashes(COUNT)).num_blocks == COUNT
    failpoints.clear()
    flood(space)
    assert (onboard(space, make_hashes(COUNT)).reasons == REASON.TIER_DOWN).all()
    cache.check_integrity()


@pytest.mark.parametrize("action", ["torn", "flip", "drop"])
def test_writes_that_lie_are_found_when_read(open_cache: Opener, action: str) -> None:
    failpoints, faults = injected()
    space = open_space(cache := open_cache(faults=faults))
    failpoints.set("write", action, count=COUNT, seed=5)
    put_on_nvme(cache, space, COUNT)
    assert failpoints.hits()[action] == COUNT
    assert (onboard(space, make_hashes(COUNT)).reasons == REASON.CORRUPT).all()
    assert sample(cache, "kvx_corrupt_blocks_total", tier="nvme") == COUNT
    space.offload(make_hashes(COUNT), make_blocks(COUNT)).wait()
    flood(space, first=2 * FLOOD_FIRST)
    assert onboard(space, make_hashes(COUNT)).num_blocks == COUNT


@pytest.mark.parametrize("durability", ["none", "batch"])
def test_failed_syncs_and_record_writes_promise_nothing(
    open_cache: Opener, durability: str
) -> None:
    """When the records do not get through, NVMe does not claim the blocks."""
    failpoints, faults = injected()
    nvme = {"durability": durability}
    space = open_space(cache := open_cache(faults=faults, nvme=nvme, breaker=LASTING))
    if durability == "none":
        failpoints.set("write", "eio", after=COUNT)
    else:
        failpoints.set("sync", "eio")
    space.offload(make_hashes(COUNT), make_blocks(COUNT)).wait()
    wait_until(lambda: sample(cache, "kvx_flushed_blocks_total", outcome="tier_down") == COUNT)
    assert cache.stats()["nvme"]["committed"] == 0
    assert onboard(space, make_hashes(COUNT)).num_blocks == COUNT
    failpoints.clear()
    assert cache.flush(10.0)
    cache.close()
    assert open_space(open_cache(nvme=nvme)).match(make_hashes(COUNT)).num_blocks == 0


def test_delays_only_take_time(open_cache: Opener) -> None:
    failpoints, faults = injected()
    space = open_space(cache := open_cache(faults=faults))
    failpoints.set("any", "delay", probability=0.3, seed=9, delay_s=0.01)
    put_on_nvme(cache, space, COUNT)
    assert onboard(space, make_hashes(COUNT)).num_blocks == COUNT
    assert failpoints.hits()["delay"] > 0


def test_breaker_opens_and_closes_again(open_cache: Opener) -> None:
    failpoints, faults = injected()
    breaker = {"failures": 3, "reset_s": 0.2}
    space = open_space(cache := open_cache(faults=faults, breaker=breaker))
    put_on_nvme(cache, space, COUNT)
    failpoints.set("read", "eio")
    for row in range(3):
        assert sample(cache, "kvx_nvme_is_up") == 1.0
        onboard(space, make_hashes(1, first=row), first=row)
    assert sample(cache, "kvx_nvme_is_up") == 0.0
    asked = failpoints.hits()["eio"]
    assert (onboard(space, make_hashes(COUNT)).reasons == REASON.TIER_DOWN).all()
    assert failpoints.hits()["eio"] == asked, "an open breaker leaves the device alone"
    newest = FLOOD_FIRST + 2 * DRAM_BLOCKS - 1
    assert onboard(space, make_hashes(1, first=newest), first=newest).num_blocks == 1
    wait_until(lambda: sample(cache, "kvx_nvme_is_up") == 1.0)
    onboard(space, make_hashes(1))
    assert sample(cache, "kvx_nvme_is_up") == 0.0, "a failed probe opens it at once"
    failpoints.clear()
    wait_until(lambda: sample(cache, "kvx_nvme_is_up") == 1.0)
    assert onboard(space, make_hashes(COUNT)).num_blocks == COUNT
    failpoints.set("read", "eio", count=1)
    flood(space, first=3 * FLOOD_FIRST)
    onboard(space, make_hashes(1))
    assert sample(cache, "kvx_nvme_is_up") == 1.0, "closed again: one failure is none"


@pytest.mark.parametrize("has_nvme", [False, True])
def test_a_bit_that_flips_in_dram(open_cache: Opener, has_nvme: bool) -> None:
    space = open_space(cache := open_cache(has_nvme=has_nvme, has_hbm=False))
    space.offload(make_hashes(COUNT), make_blocks(COUNT)).wait()
    cache.flush()
    rng = random.Random("bits")
    with space.lease(make_hashes(COUNT)) as lease:
        for address in lease.addresses[::2].tolist():
            byte = ctypes.c_uint8.from_address(address + rng.randrange(BLOCK_BYTES))
            byte.value ^= 1 << rng.randrange(8)
    result = onboard(space, make_hashes(COUNT))
    assert (result.reasons[1::2] == REASON.HIT).all()
    if has_nvme:
        assert result.num_blocks == COUNT
        assert (result.tiers[::2] == kvx.TierKind.NVME).all()
    else:
        assert (result.reasons[::2] == REASON.CORRUPT).all()
    assert sample(cache, "kvx_corrupt_blocks_total", tier="dram") == COUNT // 2
    cache.check_integrity()


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 3 MiB."""
    where = tmp_path / "disk"
    where.mkdir()
    if os.geteuid() != 0:
        pytest.skip("mounting a small file system needs root")
    options = ["-t", "tmpfs", "-o", "size=3m,mode=700", "tmpfs", str(where)]
    done = subprocess.run(["mount", *options], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        pytest.skip(f"no tmpfs can be mounted here: {done.stderr.strip()}")
    yield where
    subprocess.run(["umount", "--lazy", str(where)], check=True)


def test_a_full_disk_keeps_what_it_has(open_cache: Opener, small_disk: Path) -> None:
    """Capacity 16 MiB on a disk of 3 MiB: two extents fit, and they go on being used."""
    cache = open_cache(nvme={"path": str(small_disk / "tier"), "extent": "1MiB"})
    space = open_space(cache)
    for first in range(0, 512, 64):
        blocks = make_blocks(64, first=first)
        assert space.offload(make_hashes(64, first=first), blocks).wait().num_blocks == 64
    assert cache.flush(10.0)
    assert sample(cache, "kvx_nvme_is_up") == 1.0
    assert 1 << 20 < sample(cache, "kvx_nvme_used_bytes") <= 3 << 20
    result = onboard(space, make_hashes(512))
    assert result.num_blocks > DRAM_BLOCKS
    assert (result.tiers == kvx.TierKind.NVME).any()
    missed = result.reasons[result.reasons != REASON.HIT]
    assert (missed == REASON.EVICTED).all()
    cache.close()
    space = open_space(open_cache(nvme={"path": str(small_disk / "tier"), "extent": "1MiB"}))
    assert onboard(space, make_hashes(512)).num_blocks > 64


@pytest.mark.parametrize("seed", range(8))
def test_everything_goes_wrong_at_once(tmp_path: Path, seed: int) -> None:
    """Seeded faults of all kinds under load: right bytes or an honest miss, and nothing leaks."""
    rng = random.Random(f"faults {seed}")
    shape = Shape(rng.choice((4096, 12288)), rng.choice(("none", "batch")))
    failpoints = _core.Failpoints()
    for action in ("eio", "enospc", "short", "flip", "drop", "delay", "torn"):
        operation = "write" if action == "torn" else "any"
        if action in ("short", "flip"):
            operation = rng.choice(("read", "write"))
        probability = rng.choice((0.0, 0.05, 0.2))
        failpoints.set(operation, action, probability=probability, seed=seed, delay_s=0.003)
    failpoints.set("copy", "flip", probability=0.05, seed=seed)
    with shape.open(tmp_path / "store", faults=FaultInjection(failpoints)) as cache:
        for _ in range(80):
            step(cache, shape, rng)
        failpoints.clear()
        judge(shape.space(cache), shape)
        assert cache.flush(10.0)
        cache.check_integrity()
        for tier in ("dram", "nvme"):
            stats = cache.stats()[tier]
            leaked = [stats[name] for name in ("pinned", "reserved", "doomed")]
            assert leaked == [0, 0, 0], f"seed {seed}, {tier}"
    with shape.open(tmp_path / "store") as cache:
        judge(shape.space(cache), shape)

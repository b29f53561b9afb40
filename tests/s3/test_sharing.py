"""Machines that never met share prefixes through a bucket of a real server."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
from typing import TYPE_CHECKING

import numpy as np
import pytest

import kvx
from tests.cache.conftest import BLOCK_BYTES, make_blocks, make_hashes
from tests.s3.sharing import open_space

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from tests.s3.servers import Bucket

WIDTH = 4
KEY = "0f" * 32


@pytest.fixture
def bucket(s3_bucket: Bucket, monkeypatch: pytest.MonkeyPatch) -> Bucket:
    """Return a bucket whose keys are in the environment, as they are on any machine."""
    keys = s3_bucket.service.keys
    assert keys is not None
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", keys.access_key)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", keys.secret_key)
    monkeypatch.setenv("SEAL", KEY)
    monkeypatch.setenv("OTHER_SEAL", "a0" * 32)
    return s3_bucket


def config_of(bucket: Bucket, folder: Path, **settings: object) -> dict[str, object]:
    """Return the configuration of a machine with DRAM and NVMe of its own."""
    return {
        "tiers": [
            {"kind": "dram", "capacity": "4MiB"},
            {"kind": "nvme", "path": str(folder), "capacity": "16MiB"},
            {
                "kind": "s3", "bucket": bucket.name, "endpoint": bucket.service.url,
                "region": bucket.service.region, "blocks_per_object": WIDTH, **settings,
            },
        ]
    }  # fmt: skip


@contextlib.contextmanager
def machine(config: object, first: int, count: int) -> Iterator[subprocess.Popen[str]]:
    """Start a machine and wait until it has stored a prompt."""
    program = [sys.executable, "-m", "tests.s3.sharing", json.dumps(config), str(first), str(count)]
    with subprocess.Popen(
        program, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline().strip() == "stored"
            yield process
        finally:
            process.kill()


def bring(space: kvx.CacheSpace, count: int, first: int = 0) -> kvx.TransferResult:
    """Look a prompt up, onboard it, and look at every byte of what arrived."""
    hashes = make_hashes(count, first=first)
    space.match(hashes, wait_s=10.0)
    target = np.zeros((count, BLOCK_BYTES), np.uint8)
    result = space.onboard(hashes, target).wait()
    arrived = result.reasons == kvx.MissReason.HIT
    assert (target[arrived] == make_blocks(count, first=first)[arrived]).all()
    return result


def test_one_machine_serves_what_another_stored(bucket: Bucket, tmp_path: Path) -> None:
    with machine(config_of(bucket, tmp_path / "a"), 0, 18):
        pass  # it is killed: the bucket is all that is left of it
    cache, space = open_space(config_of(bucket, tmp_path / "b"))
    with cache:
        result = bring(space, 18)
        assert result.num_blocks == 16
        assert (result.tiers[:16] == kvx.TierKind.S3).all()
        assert (bring(space, 16).tiers == kvx.TierKind.DRAM).all()


def test_a_machine_killed_while_it_stores_leaves_whole_objects(
    bucket: Bucket, tmp_path: Path
) -> None:
    for number in range(3):
        with machine(config_of(bucket, tmp_path / f"a{number}"), 0, WIDTH) as process:
            assert process.stdin is not None
            assert process.stdout is not None
            process.stdin.write(f"{1000 * (number + 1)}\n")
            process.stdin.flush()
            assert process.stdout.readline().strip() == "offloaded"
    cache, space = open_space(config_of(bucket, tmp_path / "b"))
    with cache:
        assert bring(space, WIDTH).num_blocks == WIDTH
        for number in range(3):
            brought = bring(space, WIDTH, first=1000 * (number + 1))
            assert brought.num_blocks in (0, WIDTH)
            assert not (brought.reasons == kvx.MissReason.CORRUPT).any()
    sizes = {len(bucket.get(name)) for name in bucket.names()}
    assert len(sizes) == 1, "no object is cut short"


def test_sealed_objects_tell_nothing_without_the_key(bucket: Bucket, tmp_path: Path) -> None:
    cache, space = open_space(config_of(bucket, tmp_path / "a", seal_key_env="SEAL"))
    with cache:
        space.offload(make_hashes(8), make_blocks(8)).wait()
        assert cache.flush(30.0)
        text = repr(cache.config) + str(cache.config.to_dict()) + cache.metrics.render()
        assert KEY not in text
    plain = make_blocks(8)
    for name in bucket.names():
        body = bucket.get(name)
        assert all(plain[row, 64:128].tobytes() not in body for row in range(8))
    for settings, count in (
        ({"seal_key_env": "SEAL"}, 8),
        ({"seal_key_env": "OTHER_SEAL"}, 0),
        ({}, 0),
    ):
        folder = tmp_path / f"b{len(settings)}{count}"
        cache, space = open_space(config_of(bucket, folder, **settings))
        with cache:
            assert bring(space, 8).num_blocks == count


def test_two_machines_that_store_the_same_make_one_object(bucket: Bucket, tmp_path: Path) -> None:
    caches = [open_space(config_of(bucket, tmp_path / name)) for name in "ab"]
    transfers = [space.offload(make_hashes(16), make_blocks(16)) for _, space in caches]
    for transfer in transfers:
        transfer.wait()
    for cache, _ in caches:
        assert cache.flush(30.0)
    assert len(bucket.names()) == 4
    for cache, _ in caches:
        text = cache.metrics.render()
        assert "kvx_s3_groups_total" in text
        assert 'outcome="failed"' not in text
        cache.close()


def test_a_bucket_that_is_missing_costs_nothing_but_misses(bucket: Bucket, tmp_path: Path) -> None:
    config = config_of(bucket, tmp_path / "a")
    tiers = config["tiers"]
    assert isinstance(tiers, list)
    tiers[-1]["bucket"] = "kvx-nobody-made-this"
    cache, space = open_space(config)
    with cache:
        space.offload(make_hashes(8), make_blocks(8)).wait()
        cache.flush(10.0)
        assert bring(space, 8).num_blocks == 8
        assert 'kvx_s3_calls_total{verb="put",outcome="no_bucket"}' in cache.metrics.render()

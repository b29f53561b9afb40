"""Every fault there is between a cache and a real server: no wrong byte, no call beyond its time.

Each run stores some prompts and brings others through a proxy at which one kind of thing goes wrong
for a share of the requests. What arrives is compared with what was stored, byte for byte, by a
cache of its own that nothing else fills.
"""

from __future__ import annotations

import random
import time
from typing import TYPE_CHECKING

import numpy as np
import pytest

import kvx
from tests.cache.conftest import BLOCK_BYTES, make_blocks, make_hashes
from tests.s3.faulty.faults import CATALOGUE
from tests.s3.faulty.proxy import FaultProxy, Rule
from tests.waiting import eventually

if TYPE_CHECKING:
    from tests.s3.servers import Bucket

WIDTH = 4
COUNT = 3 * WIDTH
DEADLINE_S = 0.25
# Not how fast, but that it ends: the machine may be busy.
SLACK_S = 3.0
RUNS_ALL = 1000


@pytest.fixture
def keys(s3_bucket: Bucket, monkeypatch: pytest.MonkeyPatch) -> None:
    """Put the keys of the server where a client finds them."""
    found = s3_bucket.service.keys
    assert found is not None
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", found.access_key)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", found.secret_key)


def open_space(bucket: Bucket, url: str, tenant: str) -> tuple[kvx.TieredCache, kvx.CacheSpace]:
    """Open a cache whose bucket is behind an endpoint."""
    tier = {
        "kind": "s3", "bucket": bucket.name, "endpoint": url,
        "region": bucket.service.region, "blocks_per_object": WIDTH, "deadline_s": DEADLINE_S,
        "absent_s": 0.0,
    }  # fmt: skip
    config = {
        "tiers": [{"kind": "dram", "capacity": "4MiB"}, tier],
        "breaker": {"failures": 3, "reset_s": 0.02},
    }
    cache = kvx.TieredCache.open(config)
    return cache, cache.namespace(model="m", dtype="b", block_bytes=BLOCK_BYTES, tenant=tenant)


class Field:
    """A server, the proxy before it, a cache that stores and one that brings."""

    def __init__(self, bucket: Bucket, proxy: FaultProxy, kind: str, seed: int) -> None:
        self.proxy = proxy
        self.num_arrived = 0
        self.num_missed = 0
        self._what = f"{kind}, seed {seed}"
        self._writer, self._stored = open_space(bucket, proxy.service.url, kind)
        self._reader, self._brought = open_space(bucket, proxy.service.url, kind)

    def store(self, first: int) -> None:
        """Store a prompt; what does not come about within its time is let go."""
        begun = time.monotonic()
        hashes, blocks = make_hashes(COUNT, first=first), make_blocks(COUNT, first=first)
        self._stored.offload(hashes, blocks).wait()
        # Groups wait for each other's turn, each within a deadline of its own.
        assert self._writer.flush(3 * DEADLINE_S + SLACK_S), self._what
        assert time.monotonic() - begun < 3 * DEADLINE_S + SLACK_S, self._what

    def bring(self, first: int) -> None:
        """Look a prompt up and bring it; look at every byte that is said to have arrived."""
        begun = time.monotonic()
        hashes = make_hashes(COUNT, first=first)
        self._brought.match(hashes, wait_s=2 * DEADLINE_S)
        target = np.zeros((COUNT, BLOCK_BYTES), np.uint8)
        result = self._brought.onboard(hashes, target).wait()
        assert time.monotonic() - begun < 3 * DEADLINE_S + SLACK_S, self._what
        arrived = result.reasons == kvx.MissReason.HIT
        right = make_blocks(COUNT, first=first)
        assert (target[arrived] == right[arrived]).all(), f"{self._what}: wrong bytes"
        self.num_arrived += int(arrived.sum())
        self.num_missed += int((~arrived).sum())
        self._reader.clear()

    def close(self) -> None:
        """Let everything go well again, and see that it does; then close."""
        self.proxy.rules = ()
        self.proxy.thaw()
        for cache in (self._writer, self._reader):
            assert eventually(lambda cache=cache: cache.stats()["dram"]["reserved"] == 0)
            cache.check_integrity()
        self._writer.clear()
        assert eventually(self._works_again), f"{self._what}: it does not recover"
        for cache in (self._writer, self._reader):
            cache.close(2.0)

    def _works_again(self) -> bool:
        first, seen = 900_000, self.num_arrived
        self._writer.clear()
        self.store(first)
        self.bring(first)
        return self.num_arrived - seen == COUNT


def weather(kind: str, bucket: Bucket, seed: int, runs: int) -> Field:
    """Store and bring while one kind of fault strikes some of the requests."""
    chance = random.Random(f"{seed}/{kind}")
    with FaultProxy(bucket.service, seed=seed) as proxy:
        field = Field(bucket, proxy, kind, seed)
        for run in range(runs):
            share = chance.choice([0.3, 1.0])
            method = chance.choice(["GET", "PUT", "HEAD", ""])
            proxy.rules = (Rule(CATALOGUE[kind], method=method, share=share),)
            field.store(1000 * run)
            field.bring(1000 * run)
            proxy.rules = ()
            proxy.thaw()
        field.close()
    return field


@pytest.mark.usefixtures("keys")
@pytest.mark.parametrize("kind", CATALOGUE)
def test_every_fault_once(kind: str, s3_bucket: Bucket) -> None:
    weather(kind, s3_bucket, random.randrange(1 << 32), runs=1)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.usefixtures("keys")
def test_a_thousand_runs(s3_bucket: Bucket) -> None:
    seed = random.randrange(1 << 32)
    arrived = missed = 0
    for kind in CATALOGUE:
        field = weather(kind, s3_bucket, seed, runs=-(-RUNS_ALL // len(CATALOGUE)))
        arrived, missed = arrived + field.num_arrived, missed + field.num_missed
    assert arrived > RUNS_ALL, f"seed {seed}: too little came through to say anything"
    assert missed > RUNS_ALL, f"seed {seed}: too little went wrong to say anything"

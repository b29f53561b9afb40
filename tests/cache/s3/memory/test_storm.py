"""Whatever a service does, nobody is served a wrong byte, waits for ever, or loses a slot."""

from __future__ import annotations

import random
import time
from typing import TYPE_CHECKING

import numpy as np
import pytest

import kvx
from kvx.cache.s3.store import ObjectFault
from tests.cache.conftest import BLOCK_BYTES, make_blocks, make_hashes
from tests.waiting import eventually

if TYPE_CHECKING:
    from tests.cache.s3.memory.conftest import Opener
    from tests.cache.s3.memory_store import Bucket

BLOCKS = 24
RUNS_FAST, RUNS_ALL = 120, 1000


class Weather:
    """What goes wrong in one run, from its seed."""

    def __init__(self, bucket: Bucket, chance: random.Random) -> None:
        self._bucket = bucket
        self._chance = chance
        self._badness = chance.choice([0.05, 0.3, 0.9])
        self._kinds = chance.sample(
            ["fault", "flip", "cut", "slow", "freeze", "lose", "other", "swap"], 3
        )
        bucket.latency_s = chance.choice([0.0, 0.002])
        bucket.fault = self._fault
        bucket.tamper = self._tamper
        if "freeze" in self._kinds and chance.random() < 0.2:
            bucket.is_frozen = True
        if "lose" in self._kinds:
            for name in bucket.names():
                if chance.random() < self._badness:
                    bucket.objects.pop(name, None)
        if "swap" in self._kinds and len(bucket.names()) > 1:
            # One object under the name of another.
            one, other = chance.sample(bucket.names(), 2)
            bucket.objects[one] = bucket.objects[other]
        if "other" in self._kinds:
            for name in bucket.names():
                if chance.random() < self._badness:
                    offset = chance.randrange(len(bucket.objects[name][0]))
                    bucket.alter(name, offset, 1 << chance.randrange(8))

    def clear(self) -> None:
        """Let everything go well again."""
        self._bucket.is_frozen = False
        self._bucket.latency_s = 0.0
        self._bucket.fault = lambda _verb, _name: None
        self._bucket.tamper = lambda data: data

    def _fault(self, _verb: str, _name: str) -> ObjectFault | None:
        if "slow" in self._kinds and self._chance.random() < self._badness:
            self._bucket.latency_s = self._chance.choice([0.0, 0.02])
        if "fault" in self._kinds and self._chance.random() < self._badness:
            return self._chance.choice(list(ObjectFault))
        return None

    def _tamper(self, data: bytes) -> bytes:
        if self._chance.random() >= self._badness or not data:
            return data
        if "flip" in self._kinds:
            altered = bytearray(data)
            altered[self._chance.randrange(len(data))] ^= 1 << self._chance.randrange(8)
            return bytes(altered)
        if "cut" in self._kinds:
            return data[: self._chance.randrange(len(data))]
        return data


def run_storm(bucket: Bucket, opener: Opener, seed: int, runs: int) -> None:
    """Store and bring blocks in all weathers; two caches, one bucket."""
    num_arrived = num_missed = 0
    ours, space = opener(deadline_s=0.15)
    theirs, other = opener(deadline_s=0.15, absent_s=0.0)
    for run in range(runs):
        chance = random.Random(f"{seed}/{run}")
        first = 1000 * (run // 20)  # now and then new blocks
        hashes, blocks = make_hashes(BLOCKS, first=first), make_blocks(BLOCKS, first=first)
        space.offload(hashes, blocks).wait()
        if chance.random() < 0.7:
            ours.flush(5.0)
        weather = Weather(bucket, chance)
        target = np.zeros((BLOCKS, BLOCK_BYTES), np.uint8)
        deadline_s = chance.choice([0.02, 0.3])
        other.match(hashes, wait_s=chance.choice([0.0, 0.05]))
        begun = time.monotonic()
        transfer = other.onboard(hashes, target, deadline_s=deadline_s)
        if chance.random() < 0.1:
            transfer.cancel()
        try:
            result = transfer.wait()
        except (kvx.TransferTimeout, kvx.TransferCancelled):
            assert transfer.result is not None
            result = transfer.result
        # Not how fast, but that it ends: the machine may be busy.
        assert time.monotonic() - begun < deadline_s + 5.0, f"seed {seed} run {run}"
        arrived = result.reasons == kvx.MissReason.HIT
        assert transfer.wait_quiesced(5.0)
        assert (target[arrived] == blocks[arrived]).all(), f"seed {seed} run {run}: wrong bytes"
        num_arrived += int(arrived.sum())
        num_missed += int((~arrived).sum())
        weather.clear()
        theirs.clear()
        if chance.random() < 0.3:
            ours.clear()
    assert num_arrived > BLOCKS, f"seed {seed}: the storm must let something through"
    assert num_missed > BLOCKS, f"seed {seed}: and must not let everything through"
    for cache in (ours, theirs):
        assert eventually(lambda cache=cache: cache.stats()["dram"]["reserved"] == 0)
        cache.check_integrity()


def test_no_weather_brings_wrong_bytes(bucket: Bucket, open_s3_cache: Opener) -> None:
    run_storm(bucket, open_s3_cache, random.randrange(1 << 32), RUNS_FAST)


@pytest.mark.slow
def test_no_weather_brings_wrong_bytes_at_length(bucket: Bucket, open_s3_cache: Opener) -> None:
    run_storm(bucket, open_s3_cache, random.randrange(1 << 32), RUNS_ALL)

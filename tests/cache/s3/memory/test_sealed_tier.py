"""Tenants with keys of their own share a bucket, a prefix and even a namespace unhindered."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tests.cache.conftest import make_hashes
from tests.cache.s3.memory.conftest import WIDTH
from tests.cache.s3.memory.test_tier import bring, store

if TYPE_CHECKING:
    from tests.cache.s3.memory.conftest import Opener
    from tests.cache.s3.memory_store import Bucket

COUNT = 2 * WIDTH
WAYS = ({}, {"seal_key_env": "OUR_SEAL"}, {"seal_key_env": "THEIR_SEAL"})


@pytest.fixture(autouse=True)
def _seals(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OUR_SEAL", "01" * 32)
    monkeypatch.setenv("THEIR_SEAL", "02" * 32)


@pytest.mark.parametrize("way", range(3))
def test_who_has_another_key_neither_reads_nor_deletes(
    way: int, bucket: Bucket, open_s3_cache: Opener
) -> None:
    cache, space = open_s3_cache(**WAYS[way])
    store(cache, space, COUNT)
    before = dict(bucket.objects)
    assert len(before) == 2
    for other in range(3):
        _, stranger = open_s3_cache(**WAYS[other])
        for _ in range(4):  # damaged twice would be deleted
            found = stranger.match(make_hashes(COUNT), wait_s=5.0)
            assert found.num_blocks == (COUNT if other == way else 0)
        assert bring(stranger, COUNT).num_blocks == (COUNT if other == way else 0)
    assert bucket.objects == before


def test_who_came_first_hinders_nobody(bucket: Bucket, open_s3_cache: Opener) -> None:
    for way in WAYS:
        store(*open_s3_cache(**way), COUNT)
    assert len(bucket.names()) == 3 * 2
    for way in WAYS:
        _, space = open_s3_cache(**way)
        assert space.match(make_hashes(COUNT), wait_s=5.0).num_blocks == COUNT
        assert bring(space, COUNT).num_blocks == COUNT

"""Tenants of one cache, each with a key of its own: one bucket, the same prompts."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

import pytest

import kvx
from kvx.cache.s3.names import object_name, parse_name
from tests.cache.conftest import BLOCK_BYTES, make_blocks, make_hashes
from tests.cache.s3.memory.conftest import WIDTH
from tests.cache.s3.memory.test_tier import bring, store
from tests.waiting import eventually

if TYPE_CHECKING:
    from tests.cache.s3.memory.conftest import Opener
    from tests.cache.s3.memory_store import Bucket

COUNT = 2 * WIDTH
KEYS = {"SEAL_A": "01" * 32, "SEAL_B": "02" * 32, "SEAL_C": "03" * 32}


@pytest.fixture(autouse=True)
def _seals(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, key in KEYS.items():
        monkeypatch.setenv(name, key)


def keys_of(**variables: str) -> dict[str, dict[str, str]]:
    """Return where the keys of tenants are, as a configuration says it."""
    return {tenant: {"env": variable} for tenant, variable in variables.items()}


OURS = keys_of(a="SEAL_A", b="SEAL_B")


def space_of(cache: kvx.TieredCache, tenant: str) -> kvx.CacheSpace:
    return cache.namespace(model="m", dtype="bf16", block_bytes=BLOCK_BYTES, tenant=tenant)


def has_none(space: kvx.CacheSpace) -> None:
    """Look often enough for objects that seem damaged to be deleted; there is nothing, and why."""
    for _ in range(4):
        match = space.match(make_hashes(COUNT), wait_s=5.0)
        assert (match.num_blocks, match.reason) == (0, kvx.MissReason.NEVER_STORED)
        assert (bring(space, COUNT).reasons == kvx.MissReason.NEVER_STORED).all()


@pytest.fixture
def stored(bucket: Bucket, open_s3_cache: Opener) -> dict[str, list[str]]:
    """Store the same prompt for both tenants; returns the names of the objects of each."""
    cache, a = open_s3_cache(seal_keys=OURS)
    found = {}
    for tenant, space in (("a", a), ("b", space_of(cache, "b"))):
        before = set(bucket.names())
        store(cache, space, COUNT)
        found[tenant] = sorted(set(bucket.names()) - before)
        assert len(found[tenant]) == 2
    return found


@pytest.mark.usefixtures("stored")
def test_each_reads_its_own(bucket: Bucket, open_s3_cache: Opener) -> None:
    cache, a = open_s3_cache(seal_keys=OURS)
    for space in (a, space_of(cache, "b")):
        assert space.match(make_hashes(COUNT), wait_s=5.0).num_blocks == COUNT
        assert (bring(space, COUNT).tiers == kvx.TierKind.S3).all()
    ids = {parse_name("kvx", name).seal_id for name in bucket.names()}  # type: ignore[union-attr]
    assert len(ids) == 2
    plain = make_blocks(COUNT)
    for body, _ in bucket.objects.values():
        assert all(plain[row, 64:96].tobytes() not in body for row in range(COUNT))


@pytest.mark.usefixtures("stored")
def test_with_keys_exchanged_nobody_finds_anything(bucket: Bucket, open_s3_cache: Opener) -> None:
    before = dict(bucket.objects)
    cache, a = open_s3_cache(seal_keys=keys_of(a="SEAL_B", b="SEAL_A"))
    has_none(a)
    has_none(space_of(cache, "b"))
    assert bucket.objects == before


def test_a_renamed_object_does_not_open(
    stored: dict[str, list[str]], bucket: Bucket, open_s3_cache: Opener
) -> None:
    """Who may write to the bucket gives a's objects the names that b's key makes for a."""
    theirs = parse_name("kvx", stored["b"][0])
    assert theirs is not None
    for name in stored["a"]:
        one = parse_name("kvx", name)
        assert one is not None
        new = object_name("kvx", one.public_id, WIDTH, one.last_key, seal_id=theirs.seal_id)
        bucket.objects[new] = bucket.objects[name]
    _, a = open_s3_cache(seal_keys=keys_of(a="SEAL_B", b="SEAL_A"))
    assert a.match(make_hashes(COUNT), wait_s=5.0).num_blocks == COUNT, "the names are there"
    result = bring(a, COUNT)
    assert result.num_blocks == 0
    assert (result.reasons == kvx.MissReason.CORRUPT).all()


def test_a_tenant_without_a_key_is_refused(bucket: Bucket, open_s3_cache: Opener) -> None:
    cache, _ = open_s3_cache(seal_keys=OURS)
    for tenant in ("c", ""):
        with pytest.raises(kvx.ConfigError, match=f"tenant '{tenant}' has no key.*seal_key_file"):
            space_of(cache, tenant)
    assert not bucket.objects
    theirs, space = open_s3_cache(seal_keys=OURS, seal_key_env="SEAL_C", tenant="c")
    store(theirs, space, COUNT)
    assert all(parse_name("kvx", name).seal_id for name in bucket.names())  # type: ignore[union-attr]
    _, alone = open_s3_cache(seal_key_env="SEAL_C", tenant="c")
    assert alone.match(make_hashes(COUNT), wait_s=5.0).num_blocks == COUNT
    assert bring(alone, COUNT).num_blocks == COUNT, "the key of all others is as it always was"


def test_a_key_for_each(open_s3_cache: Opener, caplog: pytest.LogCaptureFixture) -> None:
    for double in ({"seal_keys": keys_of(a="SEAL_A", b="SEAL_A")},
                   {"seal_keys": keys_of(a="SEAL_A"), "seal_key_env": "SEAL_A"}):  # fmt: skip
        with pytest.raises(kvx.ConfigError, match="same key") as caught:
            open_s3_cache(**double)
        assert KEYS["SEAL_A"] not in str(caught.value)
    assert KEYS["SEAL_A"] not in caplog.text


def test_a_new_key_misses_and_the_old_objects_expire(
    stored: dict[str, list[str]], bucket: Bucket, open_s3_cache: Opener
) -> None:
    rotated = {**OURS, **keys_of(a="SEAL_C")}
    cache, a = open_s3_cache(seal_keys=rotated)
    has_none(a)
    b = space_of(cache, "b")
    assert b.match(make_hashes(COUNT), wait_s=5.0).num_blocks == COUNT, "it has its old one"
    store(cache, a, COUNT)
    assert len(bucket.names()) == 6
    for name in stored["a"]:
        body, at = bucket.objects[name]
        bucket.objects[name] = body, at - 7200
    open_s3_cache(seal_keys=rotated, ttl_s=3600)
    assert eventually(lambda: not set(stored["a"]) & set(bucket.names()))
    assert len(bucket.names()) == 4, "and nothing else"


def test_what_had_to_go_is_not_known_any_more(bucket: Bucket, open_s3_cache: Opener) -> None:
    cache, a = open_s3_cache(seal_keys=OURS, capacity=5 * WIDTH * BLOCK_BYTES)
    for first in range(0, 10 * COUNT, COUNT):
        store(cache, a, COUNT, first=first)
    assert eventually(lambda: len(bucket.names()) <= 5)
    assert eventually(lambda: cache.stats()["s3"]["known_objects"] == len(bucket.names()))


def test_nothing_shows_a_key(open_s3_cache: Opener, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    cache, a = open_s3_cache(seal_keys=OURS, seal_key_env="SEAL_C")
    store(cache, a, COUNT)
    text = repr(cache.config) + str(cache.config.to_dict()) + cache.metrics.render() + caplog.text
    assert "SEAL_A" in text, "where it is, is no secret"
    for key in KEYS.values():
        assert key not in text
        assert repr(bytes.fromhex(key)) not in text

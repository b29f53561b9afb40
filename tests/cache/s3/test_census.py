"""A bucket is counted from names alone, and verified block by block."""

from __future__ import annotations

import pytest

from kvx.cache.s3 import census as census_module
from kvx.cache.s3.census import Census, Verification, header_of, verify
from kvx.cache.s3.keyring import Keyring
from kvx.cache.s3.seal import Sealer
from kvx.cache.s3.store import ObjectFacts
from kvx.errors import CorruptBlock
from tests.cache.s3.groups import NOW_S, SEALER, Group
from tests.cache.s3.memory_store import Bucket, MemoryStore
from tests.cache.s3.stocking import inventory_of, put, put_group


def test_objects_are_counted_by_namespace(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(census_module, "NAMESPACES_MAX", 2)
    census = Census("kvx")
    for seed in range(5):
        name = Group(seed=seed, public_id=bytes([seed % 3]) * 16, num_blocks=seed + 1).name()
        assert census.add(ObjectFacts(name, 100, NOW_S + seed))
    assert not census.add(ObjectFacts("kvx/v2/x", 7, NOW_S))
    assert not census.add(ObjectFacts("kvx/v1/x", 8, NOW_S))
    assert not census.add(ObjectFacts("else", 9, NOW_S))
    first, second = (census.holdings[bytes([one]) * 16] for one in (0, 1))
    assert (first.objects.num_objects, first.objects.size_bytes, first.num_blocks) == (2, 200, 5)
    assert (first.oldest_s, first.newest_s) == (NOW_S, NOW_S + 3)
    assert second.num_blocks == 7
    assert census.other_namespaces.num_objects == 1
    assert census.other_versions.size_bytes == 7
    assert census.foreign.size_bytes == 17


async def verified(
    bucket: Bucket, group: Group, sealer: Sealer | None = None, *, offset: int = -1
) -> Verification:
    name = put_group(bucket, group)
    if offset >= 0:
        bucket.alter(name, offset)
    inventory = inventory_of(MemoryStore(bucket))
    keyring = Keyring({} if sealer is None else {"a": sealer, None: Sealer(b"other" * 6 + b"!!")})
    facts = ObjectFacts(name, group.shape.object_bytes, NOW_S)
    return await verify(inventory, facts, await header_of(inventory, facts), keyring)


@pytest.mark.parametrize("sealer", [None, SEALER], ids=["plain", "sealed"])
@pytest.mark.parametrize("window", [1, 9000, 1 << 20])
async def test_every_block_is_read(
    bucket: Bucket, sealer: Sealer | None, window: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(census_module, "_WINDOW_BYTES", window)
    group = Group(num_blocks=5, sealer=sealer)
    assert await verified(bucket, group, SEALER) == Verification(num_right=5)
    place = group.shape.span(3, 1)[0] + 64 + 1000
    found = await verified(bucket, group, SEALER, offset=place)
    assert found == Verification(num_right=4, num_damaged=1)


async def test_without_the_key_sealed_blocks_are_not_judged(bucket: Bucket) -> None:
    group = Group(sealer=SEALER)
    for sealer in (None, Sealer(bytes(32))):
        assert await verified(bucket, group, sealer) == Verification(num_sealed=4)
        assert bucket.calls["get"] == 1, "the header"
        bucket.calls.clear()


async def test_a_footer_that_was_damaged_meanwhile(bucket: Bucket) -> None:
    group = Group()
    found = await verified(bucket, group, offset=group.shape.object_bytes - 20)
    assert found == Verification(num_damaged=4)


@pytest.mark.parametrize("size_bytes", [1, 127, 128])
async def test_what_has_no_header(bucket: Bucket, size_bytes: int) -> None:
    put(bucket, "x", bytes(size_bytes))
    with pytest.raises(CorruptBlock):
        await header_of(inventory_of(MemoryStore(bucket)), ObjectFacts("x", size_bytes, 0.0))

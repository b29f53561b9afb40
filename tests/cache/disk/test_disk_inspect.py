"""The read-only view: what it counts, what it says of damage, and that it changes nothing."""

import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from kvx.cache.disk.inspect import HEAT_BUCKETS, describe, iter_blocks
from kvx.errors import StorageError, UsageError
from tests.cache.disk.disk_samples import NOW_S, files_of, make_records, open_store, write_all


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A store with two extents, 30 blocks of two namespaces, one killed, one expired."""
    path = tmp_path / "store"
    with open_store(path) as store:
        store.recover()
        store.allocate_extent(4096)
        store.allocate_extent(4096)
        records = make_records(30)
        namespaces = np.repeat(np.array([[1], [2]], dtype=np.uint8), [20, 10], axis=0)
        expiry = np.zeros(30, dtype=np.uint64)
        expiry[29] = NOW_S - 1
        records = replace(
            records,
            namespaces=np.ascontiguousarray(np.broadcast_to(namespaces, (30, 16))),
            heat=np.arange(30, dtype=np.uint8),
            payload_bytes=np.full(30, 100, dtype=np.uint32),
            stored_at_s=np.arange(1000, 1030, dtype=np.uint64),
            expiry_s=expiry,
        )
        pool = store.pool(4096)
        slots = np.concatenate([np.arange(15), pool.slots_per_extent + np.arange(15)])
        pool.set_records(slots, records)
        pool.kill_records(slots[:1])
        write_all(store)
    return path


def test_describe(path: Path) -> None:
    before = files_of(path)
    found = describe(path, now_s=NOW_S)
    assert (found.version, found.capacity_bytes, found.extent_bytes) == (1, 4 << 20, 256 << 10)
    assert (found.counts.live, found.counts.dead, found.counts.expired) == (28, 1, 1)
    assert [(n.fingerprint, n.num_blocks, n.payload_bytes) for n in found.namespaces] == [
        (b"\1" * 16, 19, 1900),
        (b"\2" * 16, 9, 900),
    ]
    assert [extent.num_live for extent in found.extents] == [14, 15]
    assert dict(zip(HEAT_BUCKETS, found.heat_histogram, strict=True)) == {
        0: 0, 1: 1, 2: 2, 4: 4, 8: 8, 16: 13, 32: 0, 64: 0, 128: 0,
    }  # fmt: skip
    assert (found.oldest_s, found.newest_s) == (1001, 1028)
    assert not found.is_open_elsewhere
    assert found.used_bytes <= found.capacity_bytes
    assert files_of(path) == before


def test_view_while_the_store_is_open(path: Path) -> None:
    with open_store(path) as store:
        found = describe(path, now_s=NOW_S)
        assert found.is_open_elsewhere
        assert found.holder_pid == os.getpid()
        assert found.counts.live == 28
        store.recover()
        slots = np.array([0])
        store.pool(4096).set_records(slots, make_records(1, seed=5))
        write_all(store)
        assert describe(path, now_s=NOW_S).counts.live == 29


def test_iter_blocks_says_where_payloads_lie(path: Path) -> None:
    with open_store(path) as store:
        store.recover()
        extents = list(store.extents.values())
    places = list(iter_blocks(path))
    assert [place.path for place in places] == [extent.path for extent in extents]
    offset = extents[0].header.payload_offset
    assert places[0].offsets.tolist() == [offset + index * 4096 for index in range(1, 15)]
    assert [len(place.records) for place in places] == [14, 15]
    keys = make_records(30).keys
    assert (np.concatenate([place.records.keys for place in places]) == keys[1:]).all()


def test_damage_is_described_not_raised(path: Path) -> None:
    with (path / "extent-000000.kvx").open("r+b") as file:
        file.seek(4096 + 128 * 3 + 50)
        file.write(b"\xff\xff\xff")
    os.truncate(path / "extent-000001.kvx", 8192)
    found = describe(path, now_s=NOW_S)
    assert (found.extents[0].num_damaged, found.counts.torn) == (1, 1)
    assert "8192 bytes" in found.extents[1].problem
    assert sum(len(place.records) for place in iter_blocks(path)) == 13


def test_no_store(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="holds no kvx store"):
        describe(tmp_path, now_s=NOW_S)
    with pytest.raises(UsageError, match="not a directory"):
        describe(tmp_path / "missing", now_s=NOW_S)
    (tmp_path / "kvx.store").write_bytes(b"damaged")
    with pytest.raises(StorageError, match=r"kvx\.store is damaged"):
        next(iter_blocks(tmp_path))


def test_empty_store(tmp_path: Path) -> None:
    open_store(tmp_path / "store").close()
    found = describe(tmp_path / "store", now_s=NOW_S)
    assert (found.extents, found.namespaces, found.oldest_s) == ((), (), None)
    assert sum(found.heat_histogram) == 0

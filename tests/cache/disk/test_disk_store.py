"""Extents under a quota: allocate, release, slot ids, full devices, what crashes leave."""

import errno
import fcntl
import os
import subprocess
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvx.cache.disk import DiskStore, directory, files
from kvx.cache.disk import format as disk_format
from kvx.errors import (
    CapacityError,
    StorageError,
    UsageError,
)
from tests.cache.disk.disk_samples import NOW_S, files_of, make_records, open_store, write_all


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "store"


def fill(path: Path, slot_bytes: int = 4096) -> None:
    """Create a store with one extent and ten blocks."""
    with open_store(path) as store:
        store.recover()
        store.allocate_extent(slot_bytes)
        store.pool(slot_bytes).set_records(np.arange(10), make_records(10))
        write_all(store)


def test_leak_warns(path: Path) -> None:
    store = open_store(path)
    with pytest.warns(ResourceWarning, match="was not closed"):
        del store
    open_store(path).close()


def test_recover_comes_first(path: Path) -> None:
    fill(path)
    with open_store(path) as store:
        for use in (lambda: store.pool(4096), lambda: store.allocate_extent(4096)):
            with pytest.raises(UsageError, match="call recover"):
                use()
        assert store.recover().counts.live == 10
        with pytest.raises(UsageError, match="already"):
            store.recover()


def test_full_device_leaves_nothing_half_made(tmp_path: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("mounting a tmpfs takes root")
    mount = tmp_path / "small"
    mount.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=512k", "tmpfs", str(mount)]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    if done.returncode != 0:
        pytest.skip(f"no tmpfs can be mounted here: {done.stderr.strip()}")
    try:
        with open_store(mount / "store") as store:
            store.recover()
            store.allocate_extent(4096)
            before = (files_of(store.path), store.used_bytes)
            with pytest.raises(StorageError) as caught:
                store.allocate_extent(8192)
            assert caught.value.errno == errno.ENOSPC
            assert "extent-000001" in str(caught.value)
            assert (files_of(store.path), store.used_bytes) == before
            store.release_extent(store.extents[0])
            store.allocate_extent(8192)
    finally:
        subprocess.run(["umount", "-l", str(mount)], check=True)


def test_extent_that_cannot_be_opened_is_removed(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> tuple[int, bool]:
        raise StorageError("no more descriptors", errno=errno.EMFILE)

    with open_store(path) as store:
        store.recover()
        with monkeypatch.context() as patch:
            patch.setattr("kvx.cache.disk.store.open_extent_file", refuse)
            with pytest.raises(StorageError, match="descriptors"):
                store.allocate_extent(4096)
        assert set(files_of(path)) == {"kvx.lock", "kvx.store"}


def test_what_a_crash_left_half_made_is_removed(path: Path) -> None:
    fill(path)
    (path / "extent-000001.kvx.tmp").write_bytes(bytes(12288))
    (path / "kvx.store.tmp").write_bytes(b"half")
    with open_store(path) as store:
        assert store.recover().counts.live == 10
    assert set(files_of(path)) == {"kvx.lock", "kvx.store", "extent-000000.kvx"}


def test_release_that_lost_its_removal_is_finished_at_open(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def crash(_: Path) -> None:
        raise StorageError("power cut")

    fill(path)
    with open_store(path) as store:
        store.recover()
        with monkeypatch.context() as patch:
            patch.setattr("kvx.cache.disk.store.remove_file", crash)
            with pytest.raises(StorageError, match="power cut"):
                store.release_extent(store.extents[0])
    assert "extent-000000.kvx" in files_of(path)
    with open_store(path) as store:
        assert store.recover().counts.live == 0
    assert "extent-000000.kvx" not in files_of(path)


def test_release_refuses_while_records_are_being_written(path: Path) -> None:
    fill(path)
    with open_store(path) as store:
        store.recover()
        store.pool(4096).kill_records(np.arange(3))
        writes = store.record_writes()
        with pytest.raises(UsageError, match="under way"):
            store.release_extent(store.extents[0])
        store.record_writes_done(writes)
        extent = store.extents[0]
        store.release_extent(extent)
        with pytest.raises(UsageError, match="not an extent of this store"):
            store.release_extent(extent)


def test_slot_ids_survive_release_and_restart(path: Path) -> None:
    with open_store(path) as store:
        store.recover()
        first, second, third = (store.allocate_extent(4096) for _ in range(3))
        pool = store.pool(4096)
        assert [e.first_slot for e in pool.extents] == [n * pool.slots_per_extent for n in range(3)]
        slots = np.array([third.first_slot + 2, first.first_slot], dtype=np.int64)
        places = [array.tolist() for array in pool.locate(slots)]
        assert places[0] == [third.number, first.number]
        assert places[1] == [third.header.payload_offset + 8192, first.header.payload_offset]
        hole = np.array([second.first_slot])
        store.release_extent(second)
        with pytest.raises(UsageError, match=f"slot {second.first_slot} is in no extent"):
            pool.locate(hole)
        assert [array.tolist() for array in pool.locate(slots)] == places
    with open_store(path) as store:
        store.recover()
        pool = store.pool(4096)
        assert [array.tolist() for array in pool.locate(slots)] == places
        again = store.allocate_extent(4096)
        assert again.first_slot == second.first_slot
        for outside in (-1, 3 * pool.slots_per_extent, 1 << 60):
            with pytest.raises(UsageError, match="in no extent"):
                pool.locate(np.array([outside]))


def test_smaller_capacity_releases_extents(path: Path) -> None:
    with open_store(path) as store:
        store.recover()
        for _ in range(4):
            store.allocate_extent(4096)
        used = store.used_bytes
        two_extents = used - 2 * store.extents[0].header.file_bytes
    with open_store(path, capacity_bytes=two_extents) as store:
        assert sorted(store.extents) == [0, 1]
        assert store.capacity_bytes == two_extents
    with open_store(path, capacity_bytes=two_extents + (1 << 20)) as store:
        store.recover()
        store.allocate_extent(4096)


def test_slot_larger_than_an_extent(path: Path) -> None:
    with open_store(path) as store:
        store.recover()
        extent = store.allocate_extent(1 << 20)
        assert (extent.num_slots, store.pool(1 << 20).slots_per_extent) == (1, 1)


SIZES = (4096, 8192, 12288, 65536, 1 << 20)


@settings(max_examples=25, deadline=None)
@given(
    st.integers(directory.OVERHEAD_BYTES + 12288, 2 << 20),
    st.lists(st.tuples(st.sampled_from(SIZES), st.integers(0, 20)), max_size=25),
)
def test_quota_is_never_exceeded(
    tmp_path_factory: pytest.TempPathFactory,
    capacity_bytes: int,
    actions: list[tuple[int, int]],
) -> None:
    path = tmp_path_factory.mktemp("quota")
    with open_store(path, capacity_bytes=capacity_bytes) as store:
        store.recover()
        for slot_bytes, pick in actions:
            extents = list(store.extents.values())
            if pick < len(extents):
                store.release_extent(extents[pick])
            else:
                left = capacity_bytes - store.used_bytes
                needed = disk_format.extent_file_bytes(slot_bytes, 1)
                if needed <= left:
                    store.allocate_extent(slot_bytes)
                else:
                    with pytest.raises(CapacityError) as caught:
                        store.allocate_extent(slot_bytes)
                    facts = (caught.value.available_bytes, caught.value.needed_bytes)
                    assert facts == (left, needed)
            assert sum(files_of(path).values()) <= store.used_bytes <= capacity_bytes
        ranges = {
            (e.slot_bytes, slot)
            for e in store.extents.values()
            for slot in range(e.first_slot, e.first_slot + e.num_slots)
        }
        assert len(ranges) == sum(e.num_slots for e in store.extents.values())


def test_memory_and_places_fit_direct_io(path: Path) -> None:
    fill(path)
    with open_store(path) as store:
        extent = store.extents[0]
        assert extent.mirror.ctypes.data % 4096 == 0
        assert extent.header.payload_offset % 4096 == 0
        assert bool(fcntl.fcntl(extent.fd, fcntl.F_GETFL) & os.O_DIRECT) == extent.is_direct
    assert all(files.aligned_empty(size).ctypes.data % 4096 == 0 for size in (1, 5, 4096))


def test_file_system_without_direct_io(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real_open = os.open

    def without_direct(name: Path, flags: int, *rest: int) -> int:
        if flags & os.O_DIRECT:
            raise OSError(errno.EINVAL, "Invalid argument")
        return real_open(name, flags, *rest)

    monkeypatch.setattr(os, "open", without_direct)
    fill(path)
    with open_store(path) as store:
        assert not store.extents[0].is_direct
        assert store.recover().counts.live == 10


def test_open_says_when_it_was_created(path: Path) -> None:
    DiskStore.open(path, capacity_bytes=4 << 20, clock=lambda: NOW_S).close()
    found = directory.read_superblock(path)
    assert found is not None
    assert (found.created_s, found.extent_bytes) == (NOW_S, 64 << 20)

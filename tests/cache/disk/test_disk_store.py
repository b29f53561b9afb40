"""The directory: quota, lock, modes, damage, foreign files, release and allocate."""

import errno
import fcntl
import os
import signal
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from disk_samples import NOW_S, files_of, make_records, open_store, write_all
from hypothesis import given, settings
from hypothesis import strategies as st

from kvx.cache.disk import DiskStore, directory, files
from kvx.cache.disk import format as disk_format
from kvx.errors import (
    CapacityError,
    IncompatibleError,
    StorageError,
    UnavailableError,
    UsageError,
)


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


def test_modes_whatever_the_umask(path: Path) -> None:
    before = os.umask(0)
    try:
        fill(path)
    finally:
        os.umask(before)
    assert stat.S_IMODE(path.stat().st_mode) == 0o700
    names = set()
    for entry in path.iterdir():
        assert stat.S_IMODE(entry.stat().st_mode) == 0o600, entry
        names.add(entry.name)
    assert names == {"kvx.lock", "kvx.store", "extent-000000.kvx"}


def test_existing_empty_directory_becomes_private(path: Path) -> None:
    path.mkdir(mode=0o755)
    (path / "lost+found").mkdir()
    fill(path)
    assert stat.S_IMODE(path.stat().st_mode) == 0o700
    assert (path / "lost+found").is_dir()


@pytest.mark.parametrize("recreate", [False, True])
def test_foreign_directory_is_never_touched(path: Path, recreate: bool) -> None:
    path.mkdir(mode=0o755)
    (path / "thesis.tex").write_text("years of work")
    (path / "extent-000001.kvx").write_text("looks like ours, but there is no store")
    before = files_of(path)
    with pytest.raises(UsageError, match=r"not a kvx store.*thesis\.tex"):
        open_store(path, recreate=recreate)
    assert files_of(path) == before
    assert stat.S_IMODE(path.stat().st_mode) == 0o755


def test_path_that_is_a_file(path: Path) -> None:
    path.write_text("no directory")
    with pytest.raises(UsageError, match="not a directory"):
        open_store(path)
    with pytest.raises(StorageError) as caught:
        open_store(path.parent / "missing" / "store")
    assert caught.value.errno == errno.ENOENT


def test_foreign_files_beside_a_store_survive_recreate(path: Path) -> None:
    fill(path)
    (path / "notes.txt").write_text("mine")
    with open_store(path, recreate=True) as store:
        assert not store.extents
    assert (path / "notes.txt").read_text() == "mine"
    assert set(files_of(path)) == {"kvx.lock", "kvx.store", "notes.txt"}


def damage_byte(path: Path, offset: int) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        byte = file.read(1)[0]
        file.seek(offset)
        file.write(bytes([byte ^ 0x10]))


@pytest.mark.parametrize("name", ["kvx.store", "extent-000000.kvx"])
@pytest.mark.parametrize("how", ["flip", "truncate", "empty"])
def test_damaged_file_is_named_and_recreate_rebuilds(path: Path, name: str, how: str) -> None:
    fill(path)
    if how == "flip":
        damage_byte(path / name, 40)
    else:
        size = (path / name).stat().st_size
        os.truncate(path / name, 0 if how == "empty" else size - 1)
    for _ in range(2):  # a failed open must neither repair nor lock
        with pytest.raises(StorageError, match=f"{name} is damaged: .*recreate=True") as caught:
            open_store(path)
        assert caught.value.key == str(path / name)
    with open_store(path, recreate=True) as store:
        assert store.recover().counts.live == 0
        store.allocate_extent(4096)


def test_missing_superblock_is_damage(path: Path) -> None:
    fill(path)
    (path / "kvx.store").unlink()
    with pytest.raises(StorageError, match=r"kvx\.store is damaged: it is missing"):
        open_store(path)
    with open_store(path, recreate=True) as store:
        assert not store.extents


def test_extent_of_another_store_and_under_another_name(path: Path, tmp_path: Path) -> None:
    fill(path)
    fill(tmp_path / "other")
    own = (path / "extent-000000.kvx").read_bytes()
    (path / "extent-000003.kvx").write_bytes(own)
    with pytest.raises(StorageError, match="says that it is extent-000000"):
        open_store(path)
    (path / "extent-000003.kvx").unlink()
    (path / "extent-000000.kvx").write_bytes((tmp_path / "other/extent-000000.kvx").read_bytes())
    with pytest.raises(StorageError, match="belongs to store"):
        open_store(path)


@pytest.mark.parametrize("name", ["kvx.store", "extent-000000.kvx"])
def test_other_format_version(path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(disk_format, "FORMAT_VERSION", 2)
        fill(path)
        future = (path / name).read_bytes()
    fill_path = path.parent / "ours"
    fill(fill_path)
    (fill_path / name).write_bytes(future)
    with pytest.raises(IncompatibleError, match=f"{name} has format version 2") as caught:
        open_store(fill_path)
    assert (caught.value.ours, caught.value.theirs) == (1, 2)


def test_extent_bytes_are_fixed_at_creation(path: Path) -> None:
    fill(path)
    with pytest.raises(IncompatibleError) as caught:
        open_store(path, extent_bytes=1 << 20)
    assert (caught.value.ours, caught.value.theirs) == (1 << 20, 256 << 10)
    with open_store(path, extent_bytes=None) as store:
        assert store.extent_bytes == 256 << 10


@pytest.mark.parametrize(("capacity", "extent"), [(20479, None), (1 << 20, 4095)])
def test_sizes_too_small(path: Path, capacity: int, extent: int | None) -> None:
    with pytest.raises(UsageError, match="is the least"):
        open_store(path, capacity_bytes=capacity, extent_bytes=extent)
    assert not path.exists()


@pytest.fixture
def holder(path: Path) -> Iterator[subprocess.Popen[str]]:
    """Another process that has the store open."""
    script = (
        "import sys\nfrom kvx.cache.disk import DiskStore\n"
        f"store = DiskStore.open({str(path)!r}, capacity_bytes=4 << 20)\n"
        "print('open', flush=True)\nsys.stdin.read()\n"
    )
    environment = {"PYTHONPATH": os.pathsep.join(sys.path), "PATH": os.environ["PATH"]}
    with subprocess.Popen(
        [sys.executable, "-c", script],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=environment,
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "open\n"
        yield process
        process.kill()


@pytest.mark.parametrize("recreate", [False, True])
def test_second_process_is_told_who_has_the_store(
    path: Path, holder: subprocess.Popen[str], recreate: bool
) -> None:
    before = files_of(path)
    with pytest.raises(UnavailableError, match=f"in use by process {holder.pid} "):
        open_store(path, extent_bytes=None, recreate=recreate)
    assert files_of(path) == before
    # A lock dies with its process, however that ends.
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    open_store(path, extent_bytes=None).close()


def test_lock_within_a_process(path: Path) -> None:
    with open_store(path), pytest.raises(UnavailableError, match=f"process {os.getpid()} "):
        open_store(path)
    open_store(path).close()


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

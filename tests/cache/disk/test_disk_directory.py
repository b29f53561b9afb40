"""The directory: modes, foreign files, damage, other versions, and the lock."""

import errno
import os
import signal
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from kvx.cache.disk import format as disk_format
from kvx.errors import (
    IncompatibleError,
    StorageError,
    UnavailableError,
    UsageError,
)
from tests.cache.disk.disk_samples import files_of, make_records, open_store, write_all


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

"""The directory of a store: which names are ours, the lock, the superblock.

Nothing here touches a name that is not ours, and nothing is created in a directory that holds
anything else. All files are 0600 and the directory 0700: cached KV is what users typed.
"""

import fcntl
import os
import re
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Final

from kvx.cache.disk.files import PARTIAL_SUFFIX, storage_errors, sync_directory
from kvx.cache.disk.format import (
    HEADER_BYTES,
    Superblock,
    damaged,
    default_extent_bytes,
    pack_superblock,
    unpack_superblock,
)
from kvx.errors import IncompatibleError, UnavailableError, UsageError

LOCK_NAME: Final = "kvx.lock"
STORE_NAME: Final = "kvx.store"
# Lock, superblock, and the superblock's successor while it is being replaced.
OVERHEAD_BYTES: Final = 3 * HEADER_BYTES

_EXTENT_NAME: Final = re.compile(r"extent-(\d{6})\.kvx")
_OUR_NAME: Final = re.compile(r"kvx\.lock|kvx\.store(\.tmp)?|extent-\d{6}\.kvx(\.tmp)?")
# mkfs makes it at the root of a file system of its own, which is where stores like to live.
_HARMLESS_NAMES: Final = frozenset({"lost+found"})
# `describe` and a process about to exit hold the lock for moments.
_LOCK_ATTEMPTS: Final = 5
_LOCK_RETRY_S: Final = 0.02


def extent_numbers(path: Path) -> list[int]:
    """Return the numbers of the extent files in a directory, ascending."""
    with storage_errors(path):
        matches = [_EXTENT_NAME.fullmatch(entry.name) for entry in path.iterdir()]
    return sorted(int(match.group(1)) for match in matches if match)


def prepare(path: Path) -> None:
    """Create the directory if there is none, and make sure that it may become or is a store.

    Raises:
        UsageError: It is no directory, or holds other things and no store; nothing was touched.
        StorageError: It cannot be created or read.
    """
    with storage_errors(path):
        try:
            path.mkdir(mode=0o700)
            sync_directory(path.parent)
        except FileExistsError:
            pass
        if not path.is_dir():
            raise UsageError(f"{path} is not a directory")
        names = {entry.name for entry in path.iterdir()}
    others = sorted(n for n in names - _HARMLESS_NAMES if not _OUR_NAME.fullmatch(n))
    if others and STORE_NAME not in names:
        raise UsageError(
            f"{path} is not a kvx store and not empty (it holds {others[0]!r}"
            f"{f' and {len(others) - 1} more' if len(others) > 1 else ''}); "
            "nothing was touched; name an empty or new directory"
        )


def make_private(path: Path) -> None:
    """Keep other users out of a directory that is about to become a store."""
    with storage_errors(path):
        path.chmod(0o700)


def acquire_lock(path: Path) -> int:
    """Lock a directory for this process; the lock lasts as long as the returned descriptor.

    The file is never removed: removing it would let two processes hold locks on two files.

    Raises:
        UnavailableError: Somebody else has it; names the process.
        StorageError: The lock file cannot be opened.
    """
    lock_path = path / LOCK_NAME
    flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
    with storage_errors(lock_path):
        fd = os.open(lock_path, flags, 0o600)
    try:
        with storage_errors(lock_path):
            has_lock = _try_lock(fd, fcntl.LOCK_EX, attempts=_LOCK_ATTEMPTS)
            if has_lock:
                os.fchmod(fd, 0o600)
                os.ftruncate(fd, 0)
                os.pwrite(fd, f"{os.getpid()}\n".encode(), 0)
    except BaseException:
        os.close(fd)
        raise
    if has_lock:
        return fd
    os.close(fd)
    raise UnavailableError(
        f"{path} is in use by process {holder_pid(path) or 'unknown'} (it holds {LOCK_NAME}); "
        "stop it or give this one a directory of its own"
    )


def holder_pid(path: Path) -> int | None:
    """Return the process that last locked a directory, None if the lock file does not say."""
    try:
        text = (path / LOCK_NAME).read_text()
    except OSError:
        return None
    return int(text) if text.strip().isdigit() else None


def is_locked(path: Path) -> bool:
    """Return whether somebody has a store open; looks without staying in the way."""
    try:
        fd = os.open(path / LOCK_NAME, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    except FileNotFoundError:
        return False
    try:
        return not _try_lock(fd, fcntl.LOCK_SH, attempts=1)
    finally:
        os.close(fd)


def read_superblock(path: Path) -> Superblock | None:
    """Return the superblock of the store in `path`, None if there is neither one nor extents.

    Raises:
        StorageError: It is damaged, or missing although there are extents.
        IncompatibleError: It was written by another format version.
    """
    file_path = path / STORE_NAME
    try:
        fd = os.open(file_path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    except FileNotFoundError:
        if extent_numbers(path):
            raise damaged(str(file_path), "it is missing, but there are extents") from None
        return None
    except OSError as error:
        raise damaged(str(file_path), str(error)) from error
    with os.fdopen(fd, "rb") as file, storage_errors(file_path, offset=0):
        data = file.read(HEADER_BYTES + 1)
    return unpack_superblock(data, str(file_path))


def write_superblock(path: Path, superblock: Superblock) -> None:
    """Create or replace the superblock: readers find the old or the new one, whole."""
    target = path / STORE_NAME
    partial = path / (STORE_NAME + PARTIAL_SUFFIX)
    with storage_errors(target):
        partial.unlink(missing_ok=True)
        try:
            fd = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
            with os.fdopen(fd, "wb", buffering=0) as file:
                os.fchmod(fd, 0o600)
                os.posix_fallocate(fd, 0, HEADER_BYTES)
                file.write(pack_superblock(superblock))
                os.fsync(fd)
            partial.rename(target)
        except BaseException:
            partial.unlink(missing_ok=True)
            raise
        sync_directory(path)


def remove_store_files(path: Path, *, only_partial: bool = False) -> None:
    """Remove the files of a store, but for the lock; the superblock goes last.

    Args:
        path: The store's directory.
        only_partial: Remove only what a crash left half-made.
    """
    with storage_errors(path):
        entries = [entry.name for entry in path.iterdir()]
        names = [name for name in entries if _OUR_NAME.fullmatch(name) and name != LOCK_NAME]
        if only_partial:
            names = [n for n in names if n.endswith(PARTIAL_SUFFIX)]
        # While the superblock stands, a crash leaves a store that recreate can finish.
        for name in sorted(names, key=lambda n: n == STORE_NAME):
            (path / name).unlink()
        if names:
            sync_directory(path)


def open_superblock(
    path: Path,
    *,
    capacity_bytes: int,
    extent_bytes: int | None,
    recreate: bool,
    clock: Callable[[], float],
) -> Superblock:
    """Return the superblock of a locked directory, a new one if it holds none.

    The arguments are those of `DiskStore.open`.

    Raises:
        StorageError: It is damaged, or it could not be written.
        IncompatibleError: Other format version, or other extent_bytes.
    """
    if recreate:
        remove_store_files(path)
    found = read_superblock(path)
    if found is None:
        found = Superblock(
            uuid=uuid.uuid4().bytes,
            created_s=int(clock()),
            capacity_bytes=capacity_bytes,
            extent_bytes=extent_bytes or default_extent_bytes(capacity_bytes),
        )
        make_private(path)
        write_superblock(path, found)
    if extent_bytes is not None and extent_bytes != found.extent_bytes:
        raise IncompatibleError(
            f"{path} has extents of {found.extent_bytes} bytes, {extent_bytes} were asked for; "
            "leave extent_bytes out, or open with recreate=True to rebuild the store as empty",
            ours=extent_bytes,
            theirs=found.extent_bytes,
        )
    return found


def _try_lock(fd: int, operation: int, *, attempts: int) -> bool:
    for attempt in range(attempts):
        if attempt > 0:
            time.sleep(_LOCK_RETRY_S)
        try:
            fcntl.flock(fd, operation | fcntl.LOCK_NB)
        except BlockingIOError:
            continue
        return True
    return False

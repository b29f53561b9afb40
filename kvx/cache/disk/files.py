"""Extent files: created whole and durably, opened past the kernel's cache, removed for good.

Reads and writes go through 4096-aligned memory, which is what O_DIRECT demands.
"""

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

import numpy as np

from kvx.cache.disk.format import (
    BLOCK_ALIGNMENT,
    HEADER_BYTES,
    ExtentHeader,
    damaged,
    pack_header,
    unpack_header,
)
from kvx.errors import StorageError

PARTIAL_SUFFIX: Final = ".tmp"


def extent_name(number: int) -> str:
    """Return the file name of an extent."""
    return f"extent-{number:06d}.kvx"


def create_extent_file(path: Path, header: ExtentHeader) -> Path:
    """Create an extent file at its full size, durably, or not at all.

    The file gets its name only once its header is on the device, so whatever carries the name of an
    extent has a whole header; what a crash leaves behind is a partial file, removed at next open.

    REQUIRES: the number is free.

    Returns:
        The path of the file.

    Raises:
        StorageError: With errno ENOSPC if the file system is full; nothing is left behind.
    """
    target = path / extent_name(header.number)
    partial = path / (target.name + PARTIAL_SUFFIX)
    with storage_errors(target):
        try:
            fd = os.open(partial, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
            try:
                os.fchmod(fd, 0o600)
                os.posix_fallocate(fd, 0, header.file_bytes)
                os.pwrite(fd, pack_header(header), 0)
                os.fsync(fd)
            finally:
                os.close(fd)
            partial.rename(target)
            sync_directory(path)
        except BaseException:
            partial.unlink(missing_ok=True)
            target.unlink(missing_ok=True)
            raise
    return target


def open_extent_file(path: Path) -> tuple[int, bool]:
    """Open an extent file for reading and writing, past the kernel's cache where that is possible.

    Returns:
        (fd, whether it is O_DIRECT)
    """
    flags = os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW
    with storage_errors(path):
        try:
            return os.open(path, flags | os.O_DIRECT), True
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
        return os.open(path, flags), False


def read_header(fd: int, path: Path) -> ExtentHeader:
    """Read and verify the header of an open extent file, and its size.

    Raises:
        StorageError: The header or the file's size is damaged.
        IncompatibleError: It was written by another format version.
    """
    with storage_errors(path, offset=0):
        page = aligned_empty(HEADER_BYTES)
        num_bytes = os.preadv(fd, [page.data], 0)
        file_bytes = os.fstat(fd).st_size
    header = unpack_header(page[:num_bytes].tobytes(), str(path))
    if file_bytes != header.file_bytes:
        raise damaged(str(path), f"it has {file_bytes} bytes, it should have {header.file_bytes}")
    if path.name != extent_name(header.number):
        raise damaged(str(path), f"its header says that it is {extent_name(header.number)}")
    return header


def rewrite_header(fd: int, path: Path, header: ExtentHeader) -> None:
    """Replace the header of an open extent file, durably."""
    page = aligned_empty(HEADER_BYTES)
    page[:] = np.frombuffer(pack_header(header), dtype=np.uint8)
    with storage_errors(path, offset=0):
        os.pwritev(fd, [page.data], 0)
        os.fsync(fd)


def remove_file(path: Path) -> None:
    """Remove a file durably; it may be gone already."""
    with storage_errors(path):
        path.unlink(missing_ok=True)
        sync_directory(path.parent)


def aligned_empty(num_bytes: int) -> np.ndarray[tuple[int], np.dtype[np.uint8]]:
    """Return uninitialised memory that O_DIRECT accepts: (num_bytes,) uint8, 4096-aligned."""
    memory = np.empty(num_bytes + BLOCK_ALIGNMENT - 1, dtype=np.uint8)
    start = -memory.ctypes.data % BLOCK_ALIGNMENT
    return memory[start : start + num_bytes]


@contextmanager
def storage_errors(path: Path, *, offset: int = -1) -> Iterator[None]:
    """Turn an OSError into a StorageError that names the file."""
    try:
        yield
    except StorageError:
        raise
    except OSError as error:
        raise StorageError(
            f"{path}: {error.strerror or error}", errno=error.errno, key=str(path), offset=offset
        ) from error


def sync_directory(path: Path) -> None:
    """Make the creations, renames and removals in a directory durable."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)

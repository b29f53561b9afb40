"""`kvx inspect`: what a disk tier or a bucket holds, and whether every byte is still right."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TimeRemainingColumn
from rich.table import Table

from kvx.cache.disk.inspect import describe, iter_blocks
from kvx.cli.bucket import SCHEME, add_bucket_arguments, add_seal_arguments
from kvx.cli.figures import size, when
from kvx.cli.objects import inspect_bucket
from kvx.namespace import public_id
from kvx_ext import _core

if TYPE_CHECKING:
    import argparse
    from collections.abc import Iterator

    import numpy.typing as npt

    from kvx.cache.disk.inspect import BlockPlaces, StoreDescription

HELP = (
    "show what an NVMe tier's directory or an S3 tier's bucket holds; --verify checks every block"
)

_WINDOW_BYTES = 64 << 20


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument("path", help="directory of an NVMe tier, or s3://BUCKET/PREFIX")
    parser.add_argument(
        "--verify", action="store_true", help="read every block and verify its checksum"
    )
    add_bucket_arguments(parser)
    add_seal_arguments(parser)


def run(options: argparse.Namespace) -> int:
    """Describe the store; with --verify, 1 if a block is damaged."""
    if str(options.path).startswith(SCHEME):
        return inspect_bucket(options)
    return _inspect_directory(Path(options.path), is_verifying=options.verify)


def _inspect_directory(path: Path, *, is_verifying: bool) -> int:
    console = Console()
    store = describe(path, now_s=int(time.time()))
    _print_store(console, store)
    if not is_verifying:
        return 0
    checked, damaged = _verify(path, store, console)
    console.print(f"{checked} blocks read, {damaged} damaged")
    return 1 if damaged else 0


def _print_store(console: Console, store: StoreDescription) -> None:
    console.print(
        f"[bold]{store.path}[/]  format {store.version}, store {store.uuid.hex()}, made "
        f"{when(store.created_s)}"
    )
    if store.is_open_elsewhere:
        console.print(f"open in process {store.holder_pid}: the numbers are a sample")
    console.print(
        f"{size(store.used_bytes)} of {size(store.capacity_bytes)} used by "
        f"{len(store.extents)} extents; blocks stored {when(store.oldest_s)} to "
        f"{when(store.newest_s)}"
    )
    table = Table("namespace", "blocks", "bytes")
    for namespace in store.namespaces:
        table.add_row(
            public_id(namespace.fingerprint).hex(),
            str(namespace.num_blocks),
            size(namespace.payload_bytes),
        )
    console.print(table)
    console.print(f"slots: {store.counts}")
    for extent in store.extents:
        if extent.problem:
            console.print(f"[red]{extent.path.name}[/]: {extent.problem}")


def _verify(path: Path, store: StoreDescription, console: Console) -> tuple[int, int]:
    """Read every block; returns how many, and how many were damaged."""
    total = sum(namespace.payload_bytes for namespace in store.namespaces)
    checked = damaged = 0
    columns = (BarColumn(), DownloadColumn(binary_units=True), TimeRemainingColumn())
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("verify", total=total)
        for places in iter_blocks(path):
            for good, num_bytes in _verify_extent(places):
                checked += len(good)
                damaged += int((~good).sum())
                progress.advance(task, num_bytes)
    return checked, damaged


def _verify_extent(places: BlockPlaces) -> Iterator[tuple[npt.NDArray[np.bool_], int]]:
    """Yield which blocks of a window are good, and their bytes; one size of block at a time."""
    records = places.records
    with places.path.open("rb", buffering=0) as file:
        for num_bytes in np.unique(records.payload_bytes).tolist():
            rows = np.flatnonzero(records.payload_bytes == num_bytes)
            window = max(1, _WINDOW_BYTES // num_bytes)
            for start in range(0, len(rows), window):
                part = rows[start : start + window]
                blocks = np.zeros((len(part), num_bytes), np.uint8)
                for block, offset in zip(blocks, places.offsets[part].tolist(), strict=True):
                    os.preadv(file.fileno(), [block], offset)
                found = _core.block_checksums(blocks, np.ascontiguousarray(records.keys[part]))
                yield found == records.checksums[part], blocks.nbytes

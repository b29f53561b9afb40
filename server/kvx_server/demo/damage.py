"""Damage on purpose: one bit of every block that a disk tier holds."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import kvx

if TYPE_CHECKING:
    from pathlib import Path


def flip_one_bit_of_every_block(store: Path) -> int:
    """Flip a bit in the middle of every payload; returns how many blocks that were."""
    count = 0
    for places in kvx.iter_disk_blocks(store):
        fd = os.open(places.path, os.O_RDWR)
        try:
            for offset, size in zip(
                places.offsets.tolist(), places.records.payload_bytes.tolist(), strict=True
            ):
                middle = offset + size // 2
                (byte,) = os.pread(fd, 1, middle)
                os.pwrite(fd, bytes([byte ^ 0x10]), middle)
                count += 1
        finally:
            os.close(fd)
    return count

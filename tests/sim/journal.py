"""Read the write journal of `kvx_ext` and build what a power cut could have left of a file.

The format is documented in `kvx_ext/include/kvx/journal.h`. The model of a disk: a write that
completed before a successful sync of its file was submitted is durable; of every other write each
512-byte sector independently reached the disk or not, in any order. Torn, lost and reordered writes
are all images of that model.
"""

import random
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import NewType

MAGIC = b"KVXJRNL1"
SECTOR_BYTES = 512

FileId = NewType("FileId", tuple[int, int])
"""Device and inode of a file, as `os.stat` gives them."""

_RECORD = struct.Struct("<BBHiQQQqq")
_SUBMITTED, _COMPLETED, _END = 1, 2, 3
_WRITE, _SYNC = 1, 2


class JournalError(Exception):
    """The bytes are no journal, or a damaged one."""


@dataclass(frozen=True, slots=True)
class Write:
    """One write; positions are indices into the journal's records.

    Attributes:
        file: What was written to.
        offset: Where, in bytes.
        data: What.
        submitted: Position of its submission.
        completed: Position of its successful completion, None when there was none.
    """

    file: FileId
    offset: int
    data: bytes
    submitted: int
    completed: int | None


@dataclass(frozen=True, slots=True)
class Sync:
    """One sync; the attributes are those of a Write."""

    file: FileId
    submitted: int
    completed: int | None


def file_id(path: Path) -> FileId:
    """Return the identity that the journal gives a file that exists."""
    stat = path.stat()
    return FileId((stat.st_dev, stat.st_ino))


class Journal:
    """Every write and sync that reached the backend, in order of submission.

    Attributes:
        writes: All writes.
        syncs: All syncs.
        num_records: Positions run from 0 to this.
        is_complete: Whether the backend was closed in order; false after a crash.
    """

    def __init__(self, raw: bytes) -> None:
        """Parse a journal file's bytes.

        Raises:
            JournalError: Not a journal. One that only ends early is fine.
        """
        if raw[: len(MAGIC)] != MAGIC:
            raise JournalError(f"no journal: starts with {raw[:8]!r}")
        records, self.is_complete = _parse(raw)
        self.num_records = len(records)
        completed = {
            record[3]: position
            for position, (record, _) in enumerate(records)
            if record[0] == _COMPLETED and record[2] == 0
        }
        self.writes: list[Write] = []
        self.syncs: list[Sync] = []
        for position, ((kind_of, kind, _, sequence, file, offset), data) in enumerate(records):
            if kind_of != _SUBMITTED:
                continue
            end = completed.get(sequence)
            if kind == _WRITE:
                self.writes.append(Write(file, offset, data, position, end))
            else:
                self.syncs.append(Sync(file, position, end))

    @classmethod
    def read(cls, path: Path) -> "Journal":
        """Parse the journal at `path`; see the constructor for errors."""
        return cls(path.read_bytes())

    def power_cut_image(
        self,
        file: FileId,
        initial: bytes,
        *,
        cut: int,
        rng: random.Random,
        survival: float = 0.5,
    ) -> bytearray:
        """Return one legal content of a file after the power went at position `cut`.

        Args:
            file: Which file, see `file_id`.
            initial: Its durable content when the journal began; sets the size, so preallocate.
            cut: Records from this position on have not happened; `num_records` for all.
            rng: Chooses among the legal images.
            survival: Probability that a sector which may be lost is not; higher ones give images
                that hold more than torn blocks.
        """
        writes = [w for w in self.writes if w.file == file and w.submitted < cut]
        synced = max(
            (
                sync.submitted
                for sync in self.syncs
                if sync.file == file and sync.completed is not None and sync.completed < cut
            ),
            default=-1,
        )
        touching: dict[int, list[Write]] = {}
        for write in writes:
            last_byte = min(write.offset + len(write.data), len(initial)) - 1
            for sector in range(write.offset // SECTOR_BYTES, last_byte // SECTOR_BYTES + 1):
                touching.setdefault(sector, []).append(write)
        image = bytearray(initial)
        for sector, candidates in sorted(touching.items()):
            start = sector * SECTOR_BYTES
            end = min(start + SECTOR_BYTES, len(image))
            for write in _survivors(candidates, synced, rng, survival):
                first, last = max(start, write.offset), min(end, write.offset + len(write.data))
                image[first:last] = write.data[first - write.offset : last - write.offset]
        return image


def _parse(
    raw: bytes,
) -> tuple[list[tuple[tuple[int, int, int, int, FileId, int], bytes]], bool]:
    """Split a journal into (type, kind, code, sequence, file, offset) and data."""
    records: list[tuple[tuple[int, int, int, int, FileId, int], bytes]] = []
    at = len(MAGIC)
    while at + _RECORD.size <= len(raw):
        kind_of, kind, zero, code, sequence, device, inode, offset, size = _RECORD.unpack_from(
            raw, at
        )
        at += _RECORD.size
        if kind_of == _END:
            return records, True
        if kind_of not in (_SUBMITTED, _COMPLETED) or kind not in (_WRITE, _SYNC) or zero != 0:
            raise JournalError(f"record {len(records)} is damaged")
        if at + size > len(raw):
            break
        file = FileId((device, inode))
        records.append(((kind_of, kind, code, sequence, file, offset), raw[at : at + size]))
        at += size
    return records, False


def _survivors(
    touching: list[Write], synced: int, rng: random.Random, survival: float
) -> list[Write]:
    """Choose which writes of one sector are on the disk, in the order they got there.

    Durable ones all are; two that were in flight together may have landed in either order. Of the
    others any subset is, and none undoes a durable write that was submitted after it completed.
    """
    durable = [w for w in touching if w.completed is not None and w.completed < synced]
    lost = [w for w in touching if w not in durable and rng.random() < survival]
    left = durable + lost
    order: list[Write] = []
    while left:
        # Any write may come next that no other remaining one had to precede.
        first = [w for w in left if not any(_precedes(other, w) for other in left)]
        order.append(rng.choice(first))
        left.remove(order[-1])
    return order


def _precedes(one: Write, other: Write) -> bool:
    """Tell whether `one` had completed before `other` was submitted."""
    return one.completed is not None and one.completed < other.submitted

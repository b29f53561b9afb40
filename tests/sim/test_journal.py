"""The power-cut images of a journal: nothing synced is lost, everything else may be."""

import random
import struct
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.sim.journal import MAGIC, FileId, Journal, JournalError, file_id

FILE = FileId((7, 42))
SECTOR = 512
NUM_SECTORS = 4
WRITE, SYNC = 1, 2


def submitted(sequence: int, kind: int, offset: int = 0, data: bytes = b"") -> bytes:
    """Encode the submission of a write or sync of FILE."""
    return struct.pack("<BBHiQQQqq", 1, kind, 0, 0, sequence, *FILE, offset, len(data)) + data


def completed(sequence: int, kind: int, code: int = 0) -> bytes:
    """Encode a completion."""
    return struct.pack("<BBHiQQQqq", 2, kind, 0, code, sequence, 0, 0, 0, 0)


END = struct.pack("<BBHiQQQqq", 3, 0, 0, 0, 0, 0, 0, 0, 0)


def images(raw: bytes, cut: int | None = None, size: int = SECTOR) -> set[bytes]:
    """Collect the images of 200 seeds."""
    journal = Journal(MAGIC + raw)
    position = journal.num_records if cut is None else cut
    return {
        bytes(
            journal.power_cut_image(FILE, bytes(size), cut=position, rng=random.Random(f"cut {s}"))
        )
        for s in range(200)
    }


def fill(value: int, sectors: int = 1) -> bytes:
    """Return whole sectors of one byte."""
    return bytes([value]) * (SECTOR * sectors)


def test_a_synced_write_survives_and_an_unsynced_one_may() -> None:
    write = submitted(0, WRITE, 0, fill(1)) + completed(0, WRITE)
    synced = write + submitted(1, SYNC) + completed(1, SYNC)
    assert images(write) == {fill(0), fill(1)}
    assert images(synced) == {fill(1)}
    assert images(synced, cut=3) == {fill(0), fill(1)}
    assert images(synced, cut=0) == {fill(0)}


def test_a_sync_covers_only_what_had_completed_and_only_when_it_succeeds() -> None:
    early = submitted(0, WRITE, 0, fill(1)) + submitted(1, SYNC)
    assert images(early + completed(0, WRITE) + completed(1, SYNC)) == {fill(0), fill(1)}
    write = submitted(0, WRITE, 0, fill(1)) + completed(0, WRITE)
    assert images(write + submitted(1, SYNC) + completed(1, SYNC, code=4)) == {fill(0), fill(1)}


def test_writes_are_torn_by_sector_and_reordered() -> None:
    both = submitted(0, WRITE, 0, fill(1, 2)) + completed(0, WRITE)
    both += submitted(1, WRITE, 0, fill(2, 2)) + completed(1, WRITE)
    pairs = {fill(a) + fill(b) for a in range(3) for b in range(3)}
    assert images(both, size=2 * SECTOR) == pairs


def test_writes_in_flight_together_land_in_either_order() -> None:
    raw = submitted(0, WRITE, 0, fill(1)) + submitted(1, WRITE, 0, fill(2))
    raw += completed(0, WRITE) + completed(1, WRITE) + submitted(2, SYNC) + completed(2, SYNC)
    assert images(raw) == {fill(1), fill(2)}


def test_a_killed_process_leaves_a_readable_journal() -> None:
    raw = MAGIC + submitted(0, WRITE, 0, fill(1)) + completed(0, WRITE)
    assert Journal(raw + END).is_complete
    for end in range(len(MAGIC), len(raw)):
        journal = Journal(raw[:end])
        assert not journal.is_complete
        assert len(journal.writes) == (1 if end >= len(MAGIC) + 48 + SECTOR else 0)
    with pytest.raises(JournalError):
        Journal(b"not a journal")
    with pytest.raises(JournalError):
        Journal(MAGIC + b"\xff" * 48)


def test_files_are_told_apart(tmp_path: Path) -> None:
    (tmp_path / "a").touch()
    (tmp_path / "b").touch()
    assert file_id(tmp_path / "a") != file_id(tmp_path / "b")
    journal = Journal(MAGIC + submitted(0, WRITE, 0, fill(1)))
    other = FileId((7, 43))
    assert not any(journal.power_cut_image(other, fill(0), cut=1, rng=random.Random("other")))


STEPS = st.lists(
    st.one_of(st.integers(0, NUM_SECTORS - 1), st.just("sync")), min_size=1, max_size=20
)


@settings(max_examples=200, deadline=None)
@given(steps=STEPS, seed=st.integers(0, 2**32))
def test_every_sector_is_the_last_synced_version_or_a_later_one(
    steps: list[int | str], seed: int
) -> None:
    raw = b""
    legal: list[set[int]] = [{0} for _ in range(NUM_SECTORS)]
    for number, step in enumerate(steps):
        if isinstance(step, int):
            raw += submitted(number, WRITE, step * SECTOR, fill(number + 1))
            raw += completed(number, WRITE)
            legal[step].add(number + 1)
        else:
            raw += submitted(number, SYNC) + completed(number, SYNC)
            legal = [{max(versions)} for versions in legal]
    journal = Journal(MAGIC + raw)
    image = journal.power_cut_image(
        FILE, fill(0, NUM_SECTORS), cut=journal.num_records, rng=random.Random(seed)
    )
    for sector, versions in enumerate(legal):
        content = bytes(image[sector * SECTOR : (sector + 1) * SECTOR])
        assert content in {fill(version) for version in versions}

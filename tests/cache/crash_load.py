"""A tiny cache under seeded load, with a journal of all it writes and a diary of what it promised.

Block number n always has the same bytes, so whatever a cache serves under the hash of n can be
judged without knowing what happened to the cache.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np
import numpy.typing as npt

import kvx
from kvx.cache.assembly import FaultInjection
from kvx.cache.events import BlockRemoved
from kvx_ext import _core
from tests.cache.conftest import make_blocks, make_hashes, open_space
from tests.sim.journal import FileId, Journal, file_id

NUM_BLOCKS = 48
EXTENT_BYTES = 64 << 10
UNTOUCHED = 0x07
POISON = 0xFF


@dataclass(frozen=True, slots=True)
class Shape:
    """How a cache under test is built.

    Attributes:
        block_bytes: Size of its blocks.
        durability: As in the configuration of the NVMe tier.
    """

    block_bytes: int
    durability: str

    @property
    def blocks(self) -> npt.NDArray[np.uint8]:
        """The bytes of all blocks, (NUM_BLOCKS, block_bytes) uint8."""
        if self.block_bytes not in _blocks:
            _blocks[self.block_bytes] = make_blocks(NUM_BLOCKS, block_bytes=self.block_bytes)
        return _blocks[self.block_bytes]

    def open(
        self, path: Path, *, faults: FaultInjection | None = None, dram_blocks: int = 24
    ) -> kvx.TieredCache:
        """Open a cache that holds about half of the blocks in each tier."""
        return kvx.TieredCache.open(
            {
                "tiers": [
                    {
                        "kind": "dram",
                        "capacity": max(64 << 10, dram_blocks * self.block_bytes),
                        "prefault": "never",
                    },
                    {
                        "kind": "nvme",
                        "path": str(path),
                        "capacity": 28 * self.block_bytes + 2 * EXTENT_BYTES,
                        "extent": EXTENT_BYTES,
                        "durability": self.durability,
                        "rewarm": False,
                    },
                ],
                "copy_threads": 1,
            },
            faults=faults,
        )

    def space(self, cache: kvx.TieredCache) -> kvx.CacheSpace:
        """Return the namespace of the blocks."""
        return open_space(cache, block_bytes=self.block_bytes)


_blocks: dict[int, npt.NDArray[np.uint8]] = {}
HASHES = make_hashes(NUM_BLOCKS)


@dataclass(slots=True)
class Promise:
    """What held from a successful `flush` on, until the next one.

    Attributes:
        position: Position in the journal at which `flush` had returned True.
        held: Numbers of the blocks that NVMe held then.
        dropped: Numbers that had been dropped by then and not stored again.
        removed: Numbers that NVMe let go of before the next promise.
        stored: Numbers that were offered again before the next promise.
    """

    position: int
    held: frozenset[int]
    dropped: frozenset[int]
    removed: frozenset[int] = frozenset()
    stored: frozenset[int] = frozenset()


@dataclass(frozen=True, slots=True)
class Life:
    """One process's life with a store: what it wrote, and what it had promised when.

    Attributes:
        journal: Its writes.
        files: Each extent's identity in the journal.
        initial: Each extent's durable bytes before the first write; the header for new ones.
        promises: Oldest first; none without durability.
    """

    journal: Journal
    files: dict[str, FileId]
    initial: dict[str, bytes]
    promises: list[Promise]

    def promised(self, cut: int) -> tuple[frozenset[int], frozenset[int]]:
        """Return which blocks must be there, and which must not, after a power cut at `cut`."""
        given = [promise for promise in self.promises if promise.position <= cut]
        if not given:
            return frozenset(), frozenset()
        return given[-1].held - given[-1].removed, given[-1].dropped - given[-1].stored


class Diary:
    """Follows one cache: what was dropped and stored, and what NVMe let go of, page by page."""

    def __init__(self, cache: kvx.TieredCache, space: kvx.CacheSpace, journal_path: Path) -> None:
        keys = space.namespace.keys(HASHES)
        self._cache = cache
        self._journal_path = journal_path
        self._numbers = {key.tobytes(): number for number, key in enumerate(keys)}
        self._next_event = cache.events.last_sequence + 1
        self.dropped: set[int] = set()
        self.stored: set[int] = set()

    def turn_page(self, last: list[Promise]) -> Promise:
        """Fill in how the last promise ended and return what is promised from now on.

        Its position is the journal's length in bytes, to be translated later.
        """
        for promise in last:
            promise.removed = self._removed()
            promise.stored = frozenset(self.stored)
        self._next_event = self._cache.events.last_sequence + 1
        self.stored.clear()
        keys = self._cache.snapshot().get("nvme", np.zeros((0, 16), np.uint8))
        held = frozenset(self._numbers[key.tobytes()] for key in keys)
        size = self._journal_path.stat().st_size
        return Promise(size, held, frozenset(self.dropped))

    def _removed(self) -> frozenset[int]:
        packed = b"".join(
            event.keys
            for event in self._cache.events.replay(self._next_event)
            if isinstance(event, BlockRemoved) and event.tier == "nvme"
        )
        return frozenset(self._numbers[packed[at : at + 16]] for at in range(0, len(packed), 16))


def live(
    path: Path,
    journal_path: Path,
    shape: Shape,
    rng: random.Random,
    *,
    num_steps: int,
) -> Life:
    """Run a cache on `path` for a number of random steps and return its life."""
    initial = {file.name: file.read_bytes() for file in path.glob("extent-*.kvx")}
    promises: list[Promise] = []
    with shape.open(path, faults=FaultInjection(None, str(journal_path))) as cache:
        diary = Diary(cache, shape.space(cache), journal_path)
        for _ in range(num_steps):
            if step(cache, shape, rng, diary):
                promises.append(diary.turn_page(promises[-1:]))
        cache.flush()
        diary.turn_page(promises[-1:])
        files = {file.name: file_id(file) for file in path.glob("extent-*.kvx")}
        fresh = {name: _fresh(path / name) for name in files if name not in initial}
    raw = journal_path.read_bytes()
    for promise in promises:
        promise.position = Journal(raw[: promise.position]).num_records
    is_kept = shape.durability == "batch"
    return Life(Journal(raw), files, {**initial, **fresh}, promises if is_kept else [])


def step(
    cache: kvx.TieredCache, shape: Shape, rng: random.Random, diary: Diary | None = None
) -> bool:
    """Do one random thing; True when it was a flush that succeeded."""
    space = shape.space(cache)
    rows = np.array(rng.sample(range(NUM_BLOCKS), rng.randint(1, 8)))
    what = rng.random()
    if what < 0.6:
        if diary is not None:
            diary.stored |= set(rows.tolist())
            diary.dropped -= set(rows.tolist())
        space.offload(HASHES[rows], shape.blocks[rows]).wait()
    elif what < 0.75:
        judge(space, shape, rows)
    elif what < 0.88:
        space.drop(HASHES[rows])
        if diary is not None:
            diary.dropped |= set(rows.tolist())
    else:
        return cache.flush(10.0)
    return False


def keep_busy(path: Path, shape: Shape, seed: int, ready: Connection) -> None:
    """Work on a store under faults until killed; says when the store is open. For a process."""
    rng = random.Random(f"child {seed}")
    failpoints = _core.Failpoints()
    failpoints.set("any", "delay", probability=0.3, seed=seed, delay_s=rng.uniform(0.0, 0.005))
    for action in ("eio", "short", "torn", "flip", "drop"):
        failpoints.set("write", action, probability=rng.choice((0.0, 0.02, 0.1)), seed=seed)
    with shape.open(path, faults=FaultInjection(failpoints)) as cache:
        ready.send(seed)
        while True:
            step(cache, shape, rng)


def judge(
    space: kvx.CacheSpace, shape: Shape, rows: npt.NDArray[np.int64] | None = None
) -> frozenset[int]:
    """Onboard blocks and require right bytes or an honest miss; returns the numbers served."""
    rows = np.arange(NUM_BLOCKS) if rows is None else rows
    target = np.full((len(rows), shape.block_bytes), UNTOUCHED, np.uint8)
    result = space.onboard(HASHES[rows], target).wait()
    served = result.reasons == kvx.MissReason.HIT
    wrong = (target[served] != shape.blocks[rows[served]]).any(axis=1)
    assert not wrong.any(), f"wrong bytes in blocks {rows[served][wrong].tolist()}"
    missed = target[~served]
    honest = (missed == UNTOUCHED).all(axis=1) | (missed == POISON).all(axis=1)
    assert honest.all(), f"bytes of a miss in blocks {rows[~served][~honest].tolist()}"
    return frozenset(rows[served].tolist())


def _fresh(path: Path) -> bytes:
    """Return an extent as it was created: its header, then zeros."""
    size = path.stat().st_size
    with path.open("rb") as file:
        return file.read(4096) + bytes(size - 4096)

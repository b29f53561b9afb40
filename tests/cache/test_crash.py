"""After a power cut at any moment a store opens, serves no wrong byte, and keeps its promises.

The images are those of the disk model in `tests/sim/journal.py`: torn at 512 bytes, reordered, and
any subset of what no sync had covered is lost.
"""

from __future__ import annotations

import multiprocessing
import random
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from kvx.cache.assembly import FaultInjection
from kvx_ext import _core
from tests.cache.crash_load import (
    HASHES,
    NUM_BLOCKS,
    Life,
    Shape,
    judge,
    keep_busy,
    live,
)

IMAGES_PER_LIFE = 25
STEPS_PER_LIFE = 30
SURVIVALS = (0.5, 0.9, 0.99, 1.0)
STORE_FILES = ("kvx.store", "kvx.lock")
SHAPES = [
    Shape(block_bytes, durability)
    for block_bytes in (4096, 16384)
    for durability in ("batch", "none")
]


@pytest.fixture(params=SHAPES, ids=lambda shape: f"{shape.durability}-{shape.block_bytes}")
def shape(request: pytest.FixtureRequest) -> Shape:
    found: Shape = request.param
    return found


@pytest.fixture
def memory_path(tmp_path: Path) -> Iterator[Path]:
    """A directory in memory where there is one: syncs of a shared disk would take most time."""
    memory = Path("/dev/shm")  # noqa: S108 - see above
    if not memory.is_dir():
        yield tmp_path
        return
    with tempfile.TemporaryDirectory(dir=memory) as path:
        yield Path(path)


def write_image(life: Life, store: Path, image: Path, cut: int, rng: random.Random) -> None:
    """Write what a power cut at `cut` could have left of a store into a new directory."""
    shutil.rmtree(image, ignore_errors=True)
    image.mkdir(mode=0o700)
    for name in STORE_FILES:
        shutil.copy(store / name, image / name)
    survival = rng.choice(SURVIVALS)
    for name, file in life.files.items():
        content = life.journal.power_cut_image(
            file, life.initial[name], cut=cut, rng=rng, survival=survival
        )
        (image / name).write_bytes(content)
        (image / name).chmod(0o600)


def lives(
    memory_path: Path, shape: Shape, num_cases: int, first_seed: int
) -> Iterator[tuple[int, Life, Path, random.Random]]:
    """Run seeded lives, each on what a power cut left of the one before; one item a case."""
    store, image = memory_path / "store", memory_path / "image"
    for seed in range(first_seed, first_seed + num_cases // IMAGES_PER_LIFE):
        rng = random.Random(f"{seed} {shape}")
        try:
            life = live(store, memory_path / "journal", shape, rng, num_steps=STEPS_PER_LIFE)
            for _ in range(IMAGES_PER_LIFE):
                yield seed, life, store, rng
        except BaseException:
            print(f"seed {seed}, {shape}")  # noqa: T201 - pytest shows it with the failure
            raise
        shutil.rmtree(store)
        if rng.random() < 0.7:
            shutil.move(image, store)


def check_power_cuts(memory_path: Path, shape: Shape, num_cases: int, first_seed: int = 0) -> None:
    """Cut the power at random moments; every image must open and be judged."""
    image = memory_path / "image"
    num_served = num_promised = num_done = 0
    for seed, life, store, rng in lives(memory_path, shape, num_cases, first_seed):
        cut = rng.randint(0, life.journal.num_records)
        write_image(life, store, image, cut, rng)
        kept, gone = life.promised(cut)
        where = f"seed {seed}, {shape}, cut {cut} of {life.journal.num_records}"
        with shape.open(image) as cache:
            try:
                served = judge(shape.space(cache), shape)
            except AssertionError as error:
                raise AssertionError(f"{error}; {where}") from error
            assert kept <= served, f"lost {sorted(kept - served)}; {where}"
            assert not gone & served, f"came back {sorted(gone & served)}; {where}"
            cache.check_integrity()
        num_served += len(served)
        num_promised += len(kept)
        num_done += 1
    assert num_done == num_cases
    assert num_served > 4 * num_cases, "the images must hold something to judge"
    if shape.durability == "batch":
        assert num_promised > num_cases, "something must have been promised"


def test_power_cuts(memory_path: Path, shape: Shape) -> None:
    check_power_cuts(memory_path, shape, 75)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_ten_thousand_power_cuts(memory_path: Path, shape: Shape) -> None:
    check_power_cuts(memory_path, shape, 2500, first_seed=1000)


@pytest.mark.parametrize("spoils", ["payload", "records", "both"])
def test_random_sectors_anywhere_behind_the_header(
    memory_path: Path, shape: Shape, spoils: str
) -> None:
    """Worse than any power cut: the store opens and nothing wrong is served all the same."""
    store, image = memory_path / "store", memory_path / "image"
    num_served = num_cases = 0
    for seed in range(10):
        rng = random.Random(f"damage {seed} {shape} {spoils}")
        live(store, memory_path / "journal", shape, rng, num_steps=15)
        shutil.rmtree(image, ignore_errors=True)
        shutil.copytree(store, image)
        num_spoilt = sum(spoil(path, spoils, rng) for path in image.glob("extent-*.kvx"))
        with shape.open(image) as cache:
            num_served += len(judge(shape.space(cache), shape))
            counted = cache.metrics.render()
            cache.check_integrity()
        assert num_spoilt > 0
        num_cases += "kvx_corrupt_blocks_total{" in counted
        shutil.rmtree(store)
    assert num_served > 0
    assert num_cases > 0 or spoils == "records", "the damage must have been met"


def spoil(path: Path, spoils: str, rng: random.Random) -> int:
    """Fill random sectors of an extent with random bytes; returns how many."""
    content = bytearray(path.read_bytes())
    payload_offset = int.from_bytes(content[64:72], "little")
    first = 4096 if spoils != "payload" else payload_offset
    end = payload_offset if spoils == "records" else len(content)
    sectors = range(first // 512, end // 512)
    chosen = rng.sample(sectors, max(1, len(sectors) // 20))
    for sector in chosen:
        content[sector * 512 : sector * 512 + 512] = rng.randbytes(512)
    path.write_bytes(content)
    return len(chosen)


@pytest.mark.parametrize("verb", ["drop", "clear"])
def test_what_is_dropped_on_its_way_down_does_not_come_back(
    tmp_path: Path, shape: Shape, verb: str
) -> None:
    failpoints = _core.Failpoints()
    failpoints.set("write", "hang")
    with shape.open(tmp_path / "store", faults=FaultInjection(failpoints)) as cache:
        space = shape.space(cache)
        space.offload(HASHES[:4], shape.blocks[:4]).wait()
        assert cache.stats()["nvme"]["reserved"] == 4
        assert (space.drop(HASHES[:4]) if verb == "drop" else cache.clear()) >= 4
        failpoints.clear()
        assert cache.flush(10.0)
        assert judge(space, shape) == frozenset()
    with shape.open(tmp_path / "store") as cache:
        assert judge(shape.space(cache), shape) == frozenset()


def test_kills(tmp_path: Path) -> None:
    check_kills(tmp_path, 20)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_three_hundred_kills(tmp_path: Path) -> None:
    check_kills(tmp_path, 300, first_seed=1000)


def check_kills(tmp_path: Path, num_kills: int, first_seed: int = 0) -> None:
    """SIGKILL a process that writes with faults at a random moment, again and again."""
    processes = multiprocessing.get_context("forkserver")
    processes.set_forkserver_preload(["tests.cache.crash_load"])
    shape = Shape(4096, "batch")
    store = tmp_path / "store"
    num_served = 0
    for seed in range(first_seed, first_seed + num_kills):
        rng = random.Random(f"kill {seed}")
        near, far = processes.Pipe(duplex=False)
        child = processes.Process(target=keep_busy, args=(store, shape, seed, far), daemon=True)
        child.start()
        far.close()
        assert near.poll(30.0), f"seed {seed}: the child never got ready"
        near.recv()
        time.sleep(rng.uniform(0.0, 0.15))
        child.kill()
        child.join(10.0)
        near.close()
        assert child.exitcode == -9, f"seed {seed}: the child ended by itself, see its output"
        with shape.open(store) as cache:
            try:
                num_served += len(judge(shape.space(cache), shape))
                cache.check_integrity()
            except AssertionError as error:
                raise AssertionError(f"{error}; seed {seed}") from error
        if rng.random() < 0.1:
            shutil.rmtree(store)
    assert num_served > num_kills
    assert NUM_BLOCKS * num_kills > num_served, "the faults must have cost something"

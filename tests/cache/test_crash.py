"""After a power cut at any moment a store opens, serves no wrong byte, and keeps its promises.

The images are those of the disk model in `tests/sim/journal.py`: torn at 512 bytes, reordered, and
any subset of what no sync had covered is lost.
"""

from __future__ import annotations

import random
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from tests.cache.crash_load import Life, Shape, judge, live, step

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
    tmp_path: Path, shape: Shape, num_cases: int, first_seed: int
) -> Iterator[tuple[int, Life, Path, random.Random]]:
    """Run seeded lives, each on what a power cut left of the one before; one item a case."""
    store, image = tmp_path / "store", tmp_path / "image"
    for seed in range(first_seed, first_seed + num_cases // IMAGES_PER_LIFE):
        rng = random.Random(f"{seed} {shape}")
        try:
            life = live(store, tmp_path / "journal", shape, rng, num_steps=STEPS_PER_LIFE)
            for _ in range(IMAGES_PER_LIFE):
                yield seed, life, store, rng
        except BaseException:
            print(f"seed {seed}, {shape}")  # noqa: T201 - pytest shows it with the failure
            raise
        shutil.rmtree(store)
        if rng.random() < 0.7:
            shutil.move(image, store)


def check_power_cuts(tmp_path: Path, shape: Shape, num_cases: int, first_seed: int = 0) -> None:
    """Cut the power at random moments; every image must open and be judged."""
    image = tmp_path / "image"
    num_served = num_promised = num_done = 0
    for seed, life, store, rng in lives(tmp_path, shape, num_cases, first_seed):
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


def test_power_cuts(tmp_path: Path, shape: Shape) -> None:
    check_power_cuts(tmp_path, shape, 75)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_ten_thousand_power_cuts(tmp_path: Path, shape: Shape) -> None:
    check_power_cuts(tmp_path, shape, 2500, first_seed=1000)

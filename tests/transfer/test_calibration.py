"""Calibrations: measured against a device made of numbers, kept in files, and refused."""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from kvx.config import cache_directory
from kvx.errors import TransferError
from kvx.transfer.calibration import (
    DIRECTIONS,
    METHODS,
    SHAPE,
    SIZES,
    Arena,
    Calibration,
    load,
    load_or_measure,
    measure,
)
from kvx.transfer.choices import Choice, choices, sentence
from kvx.transfer.codes import Code
from kvx_ext import _core

UUID, DRIVER = "0123456789abcdef" * 2, 13000
NOW = datetime(2026, 11, 21, tzinfo=UTC)
ARENA = Arena(host_address=1 << 40, host_bytes=16 << 20, device_address=1 << 44)
LATENCY_S = 20e-6


def a_calibration(seed: int = 1) -> Calibration:
    rng = np.random.default_rng(seed)
    return Calibration(UUID, DRIVER, NOW, rng.uniform(1, 50, SHAPE), rng.uniform(1, 50, 3))


def same(one: Calibration | None, other: Calibration) -> bool:
    return one is not None and (
        (one.uuid, one.driver_version, one.measured_at)
        == (other.uuid, other.driver_version, other.measured_at)
        and (one.gb_s == other.gb_s).all()
        and bool((one.plain_gb_s == other.plain_gb_s).all())
    )


@dataclass
class Machine:
    """A device whose runs take 10 us and bytes / rate, by the method the planner picks."""

    slowness: float = 1.0
    now_s: float = 100.0
    opened: int = 0
    closed: int = 0
    code: int = 0
    abandoned: int = 0
    used: set[tuple[str, str, int, int]] = field(default_factory=set)

    def clock(self) -> float:
        return self.now_s

    def open(self, gb_s: npt.NDArray[np.float64]) -> MachineCopier:
        self.opened += 1
        return MachineCopier(self, gb_s)


RUN_NS = {"batch": 1_000, "rows": 100, "single": 2_000, "staged": 10}
PLAIN_GB_S = {"h2d": 50.0, "d2h": 40.0, "d2d": 90.0}


@dataclass
class MachineCopier:
    machine: Machine
    gb_s: npt.NDArray[np.float64]

    def submit(
        self,
        direction: str,
        targets: npt.NDArray[np.uint64],
        sources: npt.NDArray[np.uint64],
        bytes: npt.NDArray[np.uint64],  # noqa: A002
    ) -> int:
        sizes = bytes
        host = {"h2d": sources, "d2h": targets, "d2d": None}[direction]
        if host is not None:
            assert host.min() >= ARENA.host_address
            assert (host + sizes).max() <= ARENA.host_address + ARENA.host_bytes
        for side in (targets, sources):
            if side is not host:
                assert side.min() >= ARENA.device_address
                assert (side + sizes).max() <= ARENA.device_address + 3 * ARENA.host_bytes
        plan = _core.plan_copies(
            direction, targets, sources, sizes, self.gb_s, np.zeros(3), has_kernels=True,
            staging_bytes=64 << 20,
        )  # fmt: skip
        (method,) = {METHODS[method] for method in plan["methods"].tolist()}
        assert len(plan["bytes"]) == len(sizes), "nothing merges"
        self.machine.used.add((direction, method, int(sizes[0]), len(sizes)))
        took_s = LATENCY_S + 1e-9 * (
            RUN_NS[method] * len(sizes) + int(sizes.sum()) / PLAIN_GB_S[direction]
        )
        self.machine.now_s += took_s * self.machine.slowness
        return 7

    def wait(self, ticket: int, timeout_s: float) -> int:
        assert ticket == 7
        assert timeout_s > 0
        return self.machine.code

    def close(self, timeout_s: float) -> int:
        assert timeout_s > 0
        self.machine.closed += 1
        return self.machine.abandoned


def measured(machine: Machine, **options: object) -> Calibration:
    return measure(
        machine.open, ARENA, uuid=UUID, driver_version=DRIVER, clock=machine.clock, **options
    )


def test_every_method_is_timed_at_every_size() -> None:
    machine, calls = Machine(), []
    found = measured(machine, progress=lambda done, total: calls.append((done, total)))
    for d, direction in enumerate(DIRECTIONS):
        assert found.plain_gb_s[d] == pytest.approx(PLAIN_GB_S[direction], rel=0.05)
        for m, method in enumerate(METHODS):
            for s, size in enumerate(SIZES):
                rate = size / (RUN_NS[method] + size / PLAIN_GB_S[direction])
                is_there = not (direction == "d2d" and method == "staged")
                # A copy of 4 KiB is taken off for latency, so a little more than latency is.
                assert found.gb_s[d, m, s] == pytest.approx(rate * is_there, rel=0.05)
    assert machine.opened == machine.closed == len(METHODS)
    assert calls == [(i + 1, len(calls)) for i in range(len(calls))]
    assert {(method, size) for _, method, size, count in machine.used if count > 1} == {
        (method, size) for method in METHODS for size in SIZES
    }


def test_through_the_copies_of_a_device() -> None:
    """The real thing, on the emulated device: it copies, and every rate is a number."""
    region = _core.HostRegion(8 << 20)
    device = _core.open_emulated_device(64 << 20)
    with device.allocate(24 << 20) as memory, device.pin(region.address, region.bytes) as pinned:
        assert pinned.wait(10)
        found = measure(
            lambda gb_s: _core.Copies(device, calibration=gb_s),
            Arena(region.address, region.bytes, memory.address),
            uuid=UUID, driver_version=DRIVER, methods=("batch", "single"), budget_s=20,
        )  # fmt: skip
    for method in ("batch", "single"):
        assert (found.gb_s[:, METHODS.index(method)] > 0).all()
    assert (found.plain_gb_s > 0).all()


def test_only_what_the_device_offers_is_timed() -> None:
    machine = Machine()
    found = measured(machine, methods=("single", "staged"), staged_bytes_max=64 << 10)
    assert not found.gb_s[:, METHODS.index("batch")].any()
    assert (found.gb_s[0, METHODS.index("staged")] > 0).tolist() == [True] * 5 + [False] * 6
    assert {method for _, method, _, _ in machine.used} == {"single", "staged"}


def test_a_slow_device_does_not_hold_up_the_start(caplog: pytest.LogCaptureFixture) -> None:
    """What is not done in time has no numbers at all, and is planned by the defaults."""
    quick = Machine()
    measured(quick)
    machine = Machine(slowness=2 * 1.5 / (quick.now_s - 100))
    found = measured(machine)
    assert machine.now_s - 100 < 2
    assert found.gb_s[0].any()
    assert not found.gb_s[2].any()
    assert found.plain_gb_s[2] == 0
    assert "ran out of time" in caplog.text
    assert machine.closed == machine.opened


def test_a_copy_that_fails() -> None:
    for machine, part, bytes_done in (
        (Machine(code=Code.DEVICE), "ended as DEVICE", 0),
        (Machine(code=Code.TIMEOUT, abandoned=1), "did not end", -1),
    ):
        with pytest.raises(TransferError, match=part) as raised:
            measured(machine)
        assert raised.value.bytes_done == bytes_done
        assert machine.closed == machine.opened > 0


def test_what_is_saved_is_loaded(tmp_path: Path) -> None:
    made = a_calibration()
    path = made.save(tmp_path / "not" / "yet")
    assert path.stat().st_mode & 0o077 == 0
    assert [one.name for one in path.parent.iterdir()] == [path.name]
    assert same(load(path.parent, UUID, DRIVER, now=NOW), made)
    assert load(tmp_path, UUID, DRIVER, now=NOW) is None


@pytest.mark.parametrize(
    ("changes", "part"),
    [
        ({"format": 0}, "its format is 0"),
        ({"methods": ["batch"]}, "its methods is"),
        ({"sizes": [1, 2]}, "its sizes is"),
        ({"uuid": "f" * 32}, "of device ffff"),
        ({"driver_version": 12080}, "of driver 12080, this is 13000"),
        ({"driver_version": "new"}, "ValueError"),
        ({"gb_s": [[1.0]]}, "shapes"),
        ({"gb_s": np.full(SHAPE, -1.0).tolist()}, "from 0 on"),
        ({"plain_gb_s": [1.0, 2.0, float("nan")]}, "from 0 on"),
        ({"measured_at": "yesterday"}, "ValueError"),
        ({"measured_at": "2026-11-20"}, "no zone"),
        ({"measured_at": (NOW - timedelta(days=91)).isoformat()}, "91 days old"),
    ],
)
def test_files_that_are_of_no_use(
    tmp_path: Path, changes: dict[str, object], part: str, caplog: pytest.LogCaptureFixture
) -> None:
    path = a_calibration().save(tmp_path)
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    assert load(tmp_path, UUID, DRIVER, now=NOW) is None
    assert part in caplog.text
    assert "measured anew" in caplog.text


@pytest.mark.parametrize("text", ["", "[]", "null", "{", '{"format": 1}', "\xff"])
def test_files_that_are_damaged(
    tmp_path: Path, text: str, caplog: pytest.LogCaptureFixture
) -> None:
    path = a_calibration().save(tmp_path)
    path.write_text(text, encoding="latin-1")
    assert load(tmp_path, UUID, DRIVER) is None
    assert "measured anew" in caplog.text


def test_measured_once(tmp_path: Path) -> None:
    made = replace(a_calibration(), measured_at=datetime.now(UTC))
    assert load_or_measure(tmp_path, UUID, DRIVER, lambda: made) is made
    assert same(load_or_measure(tmp_path, UUID, DRIVER, lambda: a_calibration(2)), made)
    other = replace(a_calibration(3), driver_version=12090)
    assert load_or_measure(tmp_path, UUID, 12090, lambda: other) is other


def test_a_directory_that_cannot_be_written(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("")
    made = a_calibration()
    with caplog.at_level(logging.WARNING):
        assert load_or_measure(tmp_path / "file" / "in", UUID, DRIVER, lambda: made) is made
    assert "could not be kept" in caplog.text


def test_where_files_are_kept() -> None:
    assert cache_directory({"XDG_CACHE_HOME": "/there"}) == Path("/there/kvx")
    # The specification: what is not absolute counts as not set.
    for environment in ({}, {"XDG_CACHE_HOME": ""}, {"XDG_CACHE_HOME": "here"}):
        assert cache_directory(environment) == Path.home() / ".cache" / "kvx"


def test_choices_of_the_defaults() -> None:
    found = choices("h2d", None, has_batch=True, has_kernels=True)
    assert sentence("h2d", found) == "H2D: staged up to 24KiB, batch from 28KiB"
    assert choices("h2d", None, has_batch=True, has_kernels=False) == [
        Choice("batch", 4096, 4 << 20)
    ]
    assert sentence("d2d", [Choice("rows", 4096, 4 << 20)]) == "D2D: rows"


def test_choices_of_a_calibration() -> None:
    gb_s = np.zeros(SHAPE)
    gb_s[:, METHODS.index("single")] = 30
    gb_s[:, METHODS.index("rows")] = 10
    gb_s[:, METHODS.index("rows"), :3] = 40
    made = replace(a_calibration(), gb_s=gb_s)
    found = choices("d2h", made, has_batch=False, has_kernels=False)
    assert [choice.method for choice in found] == ["rows", "single"]
    assert found[0].bytes_min == 4096
    assert found[0].bytes_max + 4096 == found[1].bytes_min

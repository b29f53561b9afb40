"""How fast each way of copying is on this device: measured once, kept in a file, read back.

The planner chooses by it (see `kvx_ext/include/kvx/copy_plan.h`). A direction without numbers is
planned by published ones.
"""

from __future__ import annotations

import json
import logging
import os
import re
import tempfile
import time
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np

from kvx.errors import TransferError
from kvx.transfer.codes import Code
from kvx_ext import _core

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    import numpy.typing as npt

_log = logging.getLogger(__name__)

DIRECTIONS: tuple[str, ...] = _core.copy_directions()
METHODS: tuple[str, ...] = _core.copy_methods()
SIZES = tuple(4096 << i for i in range(11))
SHAPE = (len(DIRECTIONS), len(METHODS), len(SIZES))

_FORMAT = 1
_AGE_MAX = timedelta(days=90)
_BYTES_EACH = 8 << 20
_REPEATS = 3
_GB = 1e9
# A copy of a few MiB takes this long on no device that works.
_PATIENCE_S = 5.0


@dataclass(frozen=True, slots=True, eq=False)
class Calibration:
    """Rates of one device under one driver.

    Attributes:
        uuid: The device's, 32 hexadecimal digits.
        driver_version: 13000 is 13.0.
        measured_at: When, with time zone.
        gb_s: (3, 4, 11) float64 GB/s by direction, method and size; 0 where not measured.
        plain_gb_s: (3,) float64, of one large copy.
    """

    uuid: str
    driver_version: int
    measured_at: datetime
    gb_s: npt.NDArray[np.float64]
    plain_gb_s: npt.NDArray[np.float64]

    def save(self, directory: Path) -> Path:
        """Write it where `load` finds it, at once or not at all.

        Raises:
            OSError: The directory cannot be made or written.
        """
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        plain = {
            "format": _FORMAT,
            "uuid": self.uuid,
            "driver_version": self.driver_version,
            "measured_at": self.measured_at.isoformat(),
            "directions": DIRECTIONS,
            "methods": METHODS,
            "sizes": SIZES,
            "gb_s": self.gb_s.tolist(),
            "plain_gb_s": self.plain_gb_s.tolist(),
        }
        path = _path_of(directory, self.uuid)
        fd, temporary = tempfile.mkstemp(prefix=path.name, dir=directory)
        try:
            with os.fdopen(fd, "w") as file:
                json.dump(plain, file, indent=1)
            Path(temporary).replace(path)
        except BaseException:
            Path(temporary).unlink(missing_ok=True)
            raise
        return path


def load(
    directory: Path, uuid: str, driver_version: int, *, now: datetime | None = None
) -> Calibration | None:
    """Return what was saved for a device; None, and why in the log, where that is of no use."""
    path = _path_of(directory, uuid)
    try:
        found = _decoded(json.loads(path.read_bytes()))
        reason = _why_not(found, uuid, driver_version, now or datetime.now(UTC))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError, KeyError) as error:
        reason = f"{type(error).__name__}: {error}"
    if reason:
        _log.warning("%s is ignored and measured anew: %s", path, reason)
        return None
    return found


def load_or_measure(
    directory: Path, uuid: str, driver_version: int, measured: Callable[[], Calibration]
) -> Calibration:
    """Return what was saved for a device, else what `measured` returns, and save that.

    A directory that cannot be written costs the next start a measurement, and is logged.
    """
    found = load(directory, uuid, driver_version)
    if found is not None:
        return found
    made = measured()
    try:
        made.save(directory)
    except OSError as error:
        _log.warning("the calibration of device %s could not be kept: %s", uuid, error)
    return made


class Copier(Protocol):
    """What is needed of `_core.Copies`, opened with a calibration."""

    def submit(
        self,
        direction: str,
        targets: npt.NDArray[np.uint64],
        sources: npt.NDArray[np.uint64],
        bytes: npt.NDArray[np.uint64],  # noqa: A002 - the name it has there
    ) -> int:
        """Begin to copy runs; returns a ticket."""

    def wait(self, ticket: int, timeout_s: float) -> int:
        """Return the code of a copy that ended, or of a timeout."""

    def close(self, timeout_s: float) -> int:
        """End; returns how many copies had to be abandoned."""


@dataclass(frozen=True, slots=True)
class Arena:
    """Memory to measure with.

    Attributes:
        host_address: Of `host_bytes` pinned bytes; 8 MiB are enough, more make it more exact.
        host_bytes: How many.
        device_address: Of at least three times as many bytes on the device.
    """

    host_address: int
    host_bytes: int
    device_address: int


def measure(
    open_copier: Callable[[npt.NDArray[np.float64]], Copier],
    arena: Arena,
    *,
    uuid: str,
    driver_version: int,
    methods: Sequence[str] = METHODS,
    staged_bytes_max: int = SIZES[-1],
    budget_s: float = 1.5,
    clock: Callable[[], float] = time.perf_counter,
    progress: Callable[[int, int], None] | None = None,
) -> Calibration:
    """Time each method at each size in each direction; the best of three each.

    A direction that is not done when the time is over stays without numbers.

    Args:
        open_copier: Opens a copier that plans by a (3, 4, 11) calibration, in which a single method
            has rates: `lambda gb_s: _core.Copies(device, calibration=gb_s)`.
        arena: Memory to copy to and fro.
        uuid: Of the device.
        driver_version: As in `Calibration`.
        methods: What the device and its driver offer.
        staged_bytes_max: Largest run that fits into half the staging memory.
        budget_s: Most seconds to spend, but for the measurement under way.
        clock: Seconds that only grow.
        progress: Called with (measurements done, measurements in all).

    Raises:
        TransferError: A copy failed or did not end. Where `bytes_done` is -1 the device may still
            write to the arena: it must never be freed.
    """
    ends = clock() + budget_s
    gb_s, plain_gb_s = np.zeros(SHAPE), np.zeros(len(DIRECTIONS))
    points = [
        (direction, size, method)
        for direction in range(len(DIRECTIONS))
        for size in range(len(SIZES))
        for method in methods
        if method != "staged"
        or (DIRECTIONS[direction] != "d2d" and SIZES[size] <= staged_bytes_max)
    ]
    stopwatch = _Stopwatch(arena, clock)
    copiers: dict[str, Copier] = {}
    try:
        for method in {*methods, "single"}:
            copiers[method] = open_copier(_forcing(method))
        for done, (direction, size, method) in enumerate(points):
            name = DIRECTIONS[direction]
            if clock() >= ends:
                gb_s[direction:] = plain_gb_s[direction:] = 0
                _log.warning("calibration ran out of time in %s; planned by defaults", name)
                break
            if plain_gb_s[direction] == 0:
                stopwatch.begin(copiers["single"], name)
                plain_gb_s[direction] = stopwatch.gb_s(copiers["single"], arena.host_bytes, 1)
            count = min(arena.host_bytes, _BYTES_EACH) // SIZES[size]
            gb_s[direction, METHODS.index(method), size] = stopwatch.gb_s(
                copiers[method], SIZES[size], count
            )
            if progress is not None:
                progress(done + 1, len(points))
    finally:
        abandoned = sum(copier.close(_PATIENCE_S) for copier in copiers.values())
        if abandoned:
            raise TransferError(f"{abandoned} copies did not end", bytes_done=-1)
    return Calibration(uuid, driver_version, datetime.now(UTC), gb_s, plain_gb_s)


class _Stopwatch:
    """Times lists whose runs touch on the host side only, so that every method can do them."""

    def __init__(self, arena: Arena, clock: Callable[[], float]) -> None:
        self._arena = arena
        self._clock = clock
        self._direction = ""
        self._latency_s = 0.0

    def begin(self, copier: Copier, direction: str) -> None:
        """Take what a tiny copy takes off all that follow: waking a thread is no part of a rate."""
        self._direction = direction
        self._latency_s = self._best_s(copier, SIZES[0], 1)

    def gb_s(self, copier: Copier, run_bytes: int, count: int) -> float:
        took_s = self._best_s(copier, run_bytes, count)
        return run_bytes * count / _GB / max(took_s - self._latency_s, took_s / 2)

    def _best_s(self, copier: Copier, run_bytes: int, count: int) -> float:
        arena, places = self._arena, np.arange(count, dtype=np.uint64)
        close = places * np.uint64(run_bytes)
        apart = 2 * close
        host = np.uint64(arena.host_address) + close
        device = np.uint64(arena.device_address) + apart
        other = np.uint64(arena.device_address + 2 * arena.host_bytes) + close
        targets, sources = {
            "h2d": (device, host), "d2h": (host, device), "d2d": (device, other),
        }[self._direction]  # fmt: skip
        sizes = np.full(count, run_bytes, np.uint64)
        took_s = []
        for _ in range(_REPEATS):
            began = self._clock()
            ticket = copier.submit(self._direction, targets, sources, sizes)
            code = copier.wait(ticket, _PATIENCE_S)
            took_s.append(self._clock() - began)
            if code != Code.OK:
                raise TransferError(f"a copy in {self._direction} ended as {Code(code).name}")
        return max(min(took_s), 1e-9)


def _forcing(method: str) -> npt.NDArray[np.float64]:
    gb_s = np.zeros(SHAPE)
    gb_s[:, METHODS.index(method)] = 1.0
    return gb_s


def _path_of(directory: Path, uuid: str) -> Path:
    assert re.fullmatch("[0-9a-f]{32}", uuid), "it becomes part of a file's name"
    return directory / f"copies-{uuid}.json"


def _why_not(found: Calibration, uuid: str, driver_version: int, now: datetime) -> str:
    if found.uuid != uuid:
        return f"it is of device {found.uuid}"
    if found.driver_version != driver_version:
        return f"it is of driver {found.driver_version}, this is {driver_version}"
    age = now - found.measured_at
    return f"it is {age.days} days old" if age > _AGE_MAX else ""


def _decoded(plain: dict[str, object]) -> Calibration:
    expected = {
        "format": _FORMAT,
        "directions": list(DIRECTIONS),
        "methods": list(METHODS),
        "sizes": list(SIZES),
    }
    for name, value in expected.items():
        if plain[name] != value:
            raise ValueError(f"its {name} is {plain[name]!r}")
    gb_s = np.array(plain["gb_s"], np.float64)
    plain_gb_s = np.array(plain["plain_gb_s"], np.float64)
    if gb_s.shape != SHAPE or plain_gb_s.shape != SHAPE[:1]:
        raise ValueError(f"its rates have shapes {gb_s.shape} and {plain_gb_s.shape}")
    rates = np.concatenate([gb_s.ravel(), plain_gb_s])
    if not (np.isfinite(rates) & (rates >= 0)).all():
        raise ValueError("its rates are not all numbers from 0 on")
    measured_at = datetime.fromisoformat(str(plain["measured_at"]))
    if measured_at.tzinfo is None:
        raise ValueError("its time has no zone")
    return Calibration(
        str(plain["uuid"]), int(str(plain["driver_version"])), measured_at, gb_s, plain_gb_s
    )

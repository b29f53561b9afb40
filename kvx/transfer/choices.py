"""What the copy planner would do, for people: which method from which size on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from kvx.sizes import format_bytes
from kvx_ext import _core

if TYPE_CHECKING:
    from collections.abc import Iterator

    from kvx.transfer.calibration import Calibration

_NUM_RUNS = 64
_STAGING_BYTES = 64 << 20
_STEP = 4096
_FINE_UNTIL = 128 << 10
_SIZE_MAX = 4 << 20
_HOST, _DEVICE = 1 << 40, 1 << 44


@dataclass(frozen=True, slots=True)
class Choice:
    """A method and the run sizes, both included, that it is chosen for."""

    method: str
    bytes_min: int
    bytes_max: int


def choices(
    direction: str, calibration: Calibration | None, *, has_batch: bool, has_kernels: bool
) -> list[Choice]:
    """Ask the planner, size after size, about a block of 64 runs that is contiguous on the host.

    Args:
        direction: ``h2d``, ``d2h`` or ``d2d``.
        calibration: None for the published defaults.
        has_batch: Whether the driver copies in batches.
        has_kernels: Whether small runs may be staged.
    """
    found: list[Choice] = []
    for run_bytes in _sizes():
        method = _method_of(
            direction, run_bytes, calibration, has_batch=has_batch, has_kernels=has_kernels
        )
        if found and found[-1].method == method:
            found[-1] = Choice(method, found[-1].bytes_min, run_bytes)
        else:
            found.append(Choice(method, run_bytes, run_bytes))
    return found


def sentence(direction: str, chosen: list[Choice]) -> str:
    """Return for instance "H2D: staged up to 24 KiB, batch from 28 KiB"."""
    if len(chosen) == 1:
        return f"{direction.upper()}: {chosen[0].method}"
    parts = [f"{chosen[0].method} up to {format_bytes(chosen[0].bytes_max)}"]
    parts += [f"{choice.method} from {format_bytes(choice.bytes_min)}" for choice in chosen[1:]]
    return f"{direction.upper()}: {', '.join(parts)}"


def _sizes() -> Iterator[int]:
    yield from range(_STEP, _FINE_UNTIL, _STEP)
    run_bytes = _FINE_UNTIL
    while run_bytes <= _SIZE_MAX:
        yield run_bytes
        run_bytes *= 2


def _method_of(
    direction: str, run_bytes: int, calibration: Calibration | None, *, has_batch: bool,
    has_kernels: bool,
) -> str:  # fmt: skip
    places = np.arange(_NUM_RUNS) * run_bytes
    host, device = (_HOST + places).astype(np.uint64), (_DEVICE + 2 * places).astype(np.uint64)
    targets, sources = (host, device) if direction == "d2h" else (device, host)
    plan = _core.plan_copies(
        direction,
        targets,
        sources,
        np.full(_NUM_RUNS, run_bytes, np.uint64),
        None if calibration is None else calibration.gb_s,
        None if calibration is None else calibration.plain_gb_s,
        has_batch=has_batch,
        has_kernels=has_kernels,
        staging_bytes=_STAGING_BYTES,
    )
    return str(_core.copy_methods()[int(np.asarray(plan["methods"])[0])])

"""How fast this device copies: remembered from a file, or measured now on memory of its own."""

from __future__ import annotations

from contextlib import ExitStack, closing
from typing import TYPE_CHECKING

from kvx.errors import TransferError
from kvx.transfer.calibration import METHODS, Arena, Calibration, load_or_measure, measure
from kvx.transfer.memory import MemoryRegion
from kvx_ext import _core

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path


_HOST_BYTES = 16 << 20
_STAGING_BYTES = 16 << 20
_COPY_TIMEOUT_S = 5.0
# How `measure` says that copies did not end.
_STILL_MOVING = -1

# Memory that a stuck device may still copy to or from; freeing it would hand it to somebody else.
_ABANDONED: list[tuple[MemoryRegion, ExitStack]] = []


def calibration_for(
    device: _core.Device,
    directory: Path,
    *,
    sm: str = "auto",
    progress: Callable[[str, int, int], None] | None = None,
) -> Calibration:
    """Return the device's rates; measured for at most 1.5 s if no file has them.

    Args:
        device: A real one; the emulation has no rates.
        directory: Where they are kept.
        sm: As `kvx.config.GpuConfig.sm`; with "never" kernels are not timed either.
        progress: Called with ("calibrate", measurements done, measurements in all).

    Raises:
        CapacityError: The device has no 48 MiB left to measure with.
        TransferError: The device fails.
    """
    info = device.info()
    uuid, driver_version = str(info["uuid"]), int(str(info["driver_version"]))
    methods = [
        method
        for method in METHODS
        if (method != "batch" or info["has_batch_copy"]) and (method != "staged" or sm == "auto")
    ]

    def measured() -> Calibration:
        region = MemoryRegion(_HOST_BYTES, numa_node=int(str(info["numa_node"])))
        region.prefault()
        with ExitStack() as arena:
            pinned = arena.enter_context(closing(device.pin(region.address, region.size_bytes)))
            memory = arena.enter_context(closing(device.allocate(3 * _HOST_BYTES)))
            pinned.wait(_COPY_TIMEOUT_S)
            try:
                return measure(
                    lambda gb_s: _core.Copies(
                        device, sm=sm, staging_bytes=_STAGING_BYTES, calibration=gb_s
                    ),
                    Arena(region.address, region.size_bytes, memory.address),
                    uuid=uuid,
                    driver_version=driver_version,
                    methods=methods,
                    staged_bytes_max=_STAGING_BYTES // 2,
                    progress=None
                    if progress is None
                    else lambda done, total: progress("calibrate", done, total),
                )
            except TransferError as error:
                if error.bytes_done == _STILL_MOVING:
                    _ABANDONED.append((region, arena.pop_all()))
                raise

    return load_or_measure(directory, uuid, driver_version, measured)

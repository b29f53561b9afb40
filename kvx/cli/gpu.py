"""What `kvx doctor` says of GPUs: the driver, each device, and how copies would be made."""

from __future__ import annotations

from typing import TYPE_CHECKING, TypedDict

from kvx.cli.finding import Finding
from kvx.errors import UnavailableError
from kvx.transfer.calibration import DIRECTIONS, Calibration, load
from kvx.transfer.choices import choices, sentence

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence
    from pathlib import Path

LIBRARY = "libcuda.so.1"
_BATCH_DRIVER = 12080
# What `kernels` of a device is where there are some, or where none were looked for yet: that takes
# a context on the device, and doctor leaves devices alone. Else it says why there are none.
_KERNEL_ORIGINS = ("fatbin", "nvrtc", "")


class DeviceFacts(TypedDict):
    """What `list_cuda_devices` tells of a device; see `kvx_ext/include/kvx/device.h`."""

    ordinal: int
    name: str
    uuid: str
    pci_bus_id: str
    total_bytes: int
    compute_major: int
    compute_minor: int
    multiprocessors: int
    copy_engines: int
    numa_node: int
    driver_version: int
    has_batch_copy: bool
    has_exportable_memory: bool
    has_stream_values: bool
    kernels: str


def gpu_findings(
    list_devices: Callable[[str], Sequence[Mapping[str, object]]], cache_directory: Path
) -> Iterator[Finding]:
    """Look at the driver and every device it has.

    Args:
        list_devices: Returns the devices behind a driver library, or raises UnavailableError.
        cache_directory: Where calibrations are kept.
    """
    try:
        devices: list[DeviceFacts] = [{**one} for one in list_devices(LIBRARY)]  # type: ignore[typeddict-item]
    except UnavailableError as error:
        yield Finding(
            "GPU", is_good=False, found=f"none: {error}",
            remedy="an NVIDIA GPU and its driver; without, kvx moves host memory only",
        )  # fmt: skip
        return
    yield _driver(devices)
    for device in devices:
        yield from _device(device, cache_directory)


def _driver(devices: list[DeviceFacts]) -> Finding:
    if not devices:
        return Finding(
            "GPU", is_good=False, found="the driver is here and sees no device",
            remedy="CUDA_VISIBLE_DEVICES or the container may hide it",
        )  # fmt: skip
    version = devices[0]["driver_version"]
    is_good = version >= _BATCH_DRIVER
    return Finding(
        "GPU", is_good=is_good,
        found=f"{len(devices)} device(s), driver for CUDA {_version(version)}",
        remedy="" if is_good else "a driver for CUDA 12.8 or later copies in batches",
    )  # fmt: skip


def _device(device: DeviceFacts, cache_directory: Path) -> Iterator[Finding]:
    subject = f"GPU {device['ordinal']}"
    node = device["numa_node"]
    facts = [
        device["name"],
        f"{device['total_bytes'] / 2**30:.1f} GiB",
        f"compute {device['compute_major']}.{device['compute_minor']}",
        f"{device['copy_engines']} copy engine(s)",
        f"NUMA node {node}" if node >= 0 else "NUMA node unknown",
        device["pci_bus_id"],
    ]
    has_engines = device["copy_engines"] > 0
    remedy = "" if has_engines else "a device whose copies need not wait for its kernels"
    yield Finding(subject, is_good=has_engines, found=", ".join(facts), remedy=remedy)
    yield _ability(
        f"{subject} batch copies", device["has_batch_copy"], "a driver for CUDA 12.8 or later"
    )
    yield _ability(
        f"{subject} exportable memory", device["has_exportable_memory"],
        "other processes map its memory by IPC handle only; a driver with VMM and file descriptors",
    )  # fmt: skip
    has_kernels = device["kernels"] in _KERNEL_ORIGINS
    yield Finding(
        f"{subject} kernels", is_good=has_kernels,
        found=device["kernels"] or "not looked for: they load when the device is first used",
        remedy="" if has_kernels else "small runs go to the copy engines one by one, and slowly; "
        "build kvx where nvcc is, or install nvidia-cuda-nvrtc of the driver's version",
    )  # fmt: skip
    yield _copies(subject, device, cache_directory, has_kernels=has_kernels)


def _ability(subject: str, is_there: bool, remedy: str) -> Finding:  # noqa: FBT001 - the answer itself
    return Finding(
        subject,
        is_good=is_there,
        found="yes" if is_there else "no",
        remedy="" if is_there else remedy,
    )


def _copies(
    subject: str, device: DeviceFacts, cache_directory: Path, *, has_kernels: bool
) -> Finding:
    calibration = load(cache_directory, device["uuid"], device["driver_version"])
    lines = [
        sentence(direction, choices(
            direction, calibration, has_batch=device["has_batch_copy"], has_kernels=has_kernels,
        ))
        for direction in DIRECTIONS
    ]  # fmt: skip
    return Finding(
        f"{subject} copies", is_good=calibration is not None,
        found="\n".join([*lines, _source_of(calibration)]),
        remedy="" if calibration else "it is measured when a cache first opens the device",
    )  # fmt: skip


def _source_of(calibration: Calibration | None) -> str:
    if calibration is None:
        return "by published numbers of an H100"
    return f"by what was measured on {calibration.measured_at:%Y-%m-%d %H:%M}"


def _version(number: int) -> str:
    return f"{number // 1000}.{number % 1000 // 10}"

"""What the figures were measured on."""

from __future__ import annotations

import os
import platform
from pathlib import Path

import kvx
from kvx.errors import UnavailableError
from kvx_bench.gpu.link import read_link
from kvx_ext import _core


def describe_machine(driver: str) -> dict[str, object]:
    """Return what a reader needs to place the figures; `driver` is the library of CUDA's."""
    return {
        "cpu": _field("/proc/cpuinfo", "model name"),
        "cpus": len(os.sched_getaffinity(0)),
        "memory": _field("/proc/meminfo", "MemTotal"),
        "kernel": platform.release(),
        "python": platform.python_version(),
        "kvx": kvx.__version__,
        "checksum_kernel": _core.checksum_kernels()[0],
        "io_uring": _core.probe_io_uring() or "works",
        "gpus": _gpus(driver),
    }


def _gpus(driver: str) -> list[dict[str, object]] | str:
    """Return what every GPU is and how it is connected, or why there is none."""
    try:
        devices = _core.list_cuda_devices(driver)
    except UnavailableError as error:
        return f"none: {error}"
    return [_gpu(device) for device in devices]


def _gpu(device: dict[str, object]) -> dict[str, object]:
    facts = (
        "name", "total_bytes", "multiprocessors", "copy_engines", "driver_version", "pci_bus_id",
        "numa_node",
    )  # fmt: skip
    link = read_link(str(device["pci_bus_id"]))
    return {name: device[name] for name in facts} | {"link": str(link) if link else "unknown"}


def _field(path: str, name: str) -> str:
    for line in Path(path).read_text().splitlines():
        if line.startswith(name):
            return line.split(":", 1)[1].strip()
    return "unknown"

"""What the figures were measured on."""

from __future__ import annotations

import os
import platform
from pathlib import Path

import kvx
from kvx_ext import _core


def describe_machine() -> dict[str, object]:
    """Return what a reader needs to place the figures."""
    return {
        "cpu": _field("/proc/cpuinfo", "model name"),
        "cpus": len(os.sched_getaffinity(0)),
        "memory": _field("/proc/meminfo", "MemTotal"),
        "kernel": platform.release(),
        "python": platform.python_version(),
        "kvx": kvx.__version__,
        "checksum_kernel": _core.checksum_kernels()[0],
        "io_uring": _core.probe_io_uring() or "works",
    }


def _field(path: str, name: str) -> str:
    for line in Path(path).read_text().splitlines():
        if line.startswith(name):
            return line.split(":", 1)[1].strip()
    return "unknown"

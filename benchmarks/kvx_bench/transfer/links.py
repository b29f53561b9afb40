"""Links that transfers could take here: RDMA devices, GPUs, and the links between those."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from kvx.errors import KvxError, UnavailableError
from kvx_bench.row import GB, median, timed
from kvx_ext import _core

_RDMA = Path("/sys/class/infiniband")
_PEER_BYTES = 256 << 20
_PEER_ROUNDS = 5
_PATIENCE_S = 60.0


@dataclass(frozen=True, slots=True)
class RdmaPort:
    """A port of an RDMA device, as the kernel tells.

    Attributes:
        device: Name of the device, such as mlx5_0.
        port: Number.
        state: Such as "ACTIVE".
        rate: Such as "400 Gb/sec (4X NDR)".
        layer: "InfiniBand" or "Ethernet".
    """

    device: str
    port: str
    state: str
    rate: str
    layer: str


def rdma_ports(root: Path = _RDMA) -> list[RdmaPort]:
    """Return every port of every RDMA device."""
    found = []
    for port in sorted(root.glob("*/ports/*")):
        state, rate, layer = (_text(port / name) for name in ("state", "rate", "link_layer"))
        found.append(RdmaPort(port.parts[-3], port.name, state.split(":")[-1].strip(), rate, layer))
    return found


def link_lines(driver: str, root: Path = _RDMA, *, peer_bytes: int = _PEER_BYTES) -> list[str]:
    """Return a line for each link, or why there is none.

    Args:
        driver: Library of CUDA's.
        root: Where the kernel lists RDMA devices.
        peer_bytes: What is copied between every two GPUs.
    """
    ports = rdma_ports(root)
    lines = [
        f"RDMA: {one.device} port {one.port}, {one.layer}, {one.state}, {one.rate}" for one in ports
    ]
    if not ports:
        lines = [f"RDMA: not here because the kernel lists no device in {root}"]
    try:
        names = [str(device["name"]) for device in _core.list_cuda_devices(driver)]
    except UnavailableError as error:
        return [*lines, f"GPU: not here because {error}"]
    lines += [f"GPU {ordinal}: {name}" for ordinal, name in enumerate(names)]
    if len(names) < 2:  # noqa: PLR2004 - it takes two
        return [*lines, f"GPU to GPU: not here because there is {len(names)} GPU, it takes two"]
    return [*lines, *_peer_lines(driver, len(names), peer_bytes)]


def _peer_lines(driver: str, count: int, num_bytes: int) -> list[str]:
    lines = []
    for source in range(count):
        for target in range(count):
            if source == target:
                continue
            try:
                rate = f"{peer_gb_per_s(driver, source, target, num_bytes):.1f} GB/s"
            except KvxError as error:
                rate = f"not here because {error}"
            lines.append(f"GPU {source} to GPU {target}: {rate}")
    return lines


def peer_gb_per_s(driver: str, source: int, target: int, num_bytes: int) -> float:
    """Return the median rate of copies from one GPU straight to another.

    Raises:
        KvxError: They do not reach each other, or there is not enough memory.
    """
    devices = [_core.open_cuda_device(driver, ordinal) for ordinal in (source, target)]
    devices[0].enable_peer(devices[1])
    with (
        devices[0].allocate(num_bytes) as here,
        devices[1].allocate(num_bytes) as there,
        _core.Copies(devices[0], sm="never") as copies,
    ):
        to, since, size = (
            np.array([value], np.uint64) for value in (there.address, here.address, num_bytes)
        )

        def copy() -> None:
            code = copies.wait(copies.submit("d2d", to, since, size), _PATIENCE_S)
            if code != 0:
                raise UnavailableError(
                    f"a copy from GPU {source} to GPU {target} ended with {code}"
                )

        copy()
        return num_bytes / GB / median(timed(copy).wall_s for _ in range(_PEER_ROUNDS))


def _text(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return "unknown"

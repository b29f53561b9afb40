"""The other process of the sharing tests: maps what it is sent, looks at it and writes it.

    python -m tests.gpu.peer LIBRARY SOCKET_FD

One message comes in on the socket: JSON, and the descriptor of exportable memory. One goes out.
"""

from __future__ import annotations

import ctypes
import json
import os
import socket
import sys

import numpy as np

from kvx.transfer.memory import MemoryRegion
from kvx_ext import _core
from tests.gpu.rig import copy_one

_MESSAGE_BYTES = 65536


def main(library: str, socket_fd: int) -> None:
    """Answer one request."""
    with socket.socket(fileno=socket_fd) as channel:
        message, fds, _, _ = socket.recv_fds(channel, _MESSAGE_BYTES, 1)
        request = json.loads(message)
        fd = fds[0] if fds else -1
        seen = exchange(
            library,
            (bytes.fromhex(request["bytes"]), fd, request["size_bytes"]),
            request["write"],
        )
        if fd >= 0:
            os.close(fd)
        answer = {"seen": seen, "convictions": convictions(library)}
        channel.sendall(json.dumps(answer).encode())


def exchange(library: str, handle: tuple[bytes, int, int], value: int) -> list[int]:
    """Return which values the shared memory holds; fill it with another."""
    device = _core.open_cuda_device(library)
    with device.open_shared(*handle) as memory, _core.Copies(device, sm="never") as copies:
        region = MemoryRegion(memory.bytes)
        with device.pin(region.address, region.size_bytes):
            copy_one(copies, "d2h", region.address, memory.address, memory.bytes)
            seen = np.unique(region.array()[: memory.bytes]).tolist()
            region.array()[:] = value
            copy_one(copies, "h2d", memory.address, region.address, memory.bytes)
    assert not device.health()
    return [int(one) for one in seen]


def convictions(library: str) -> int:
    """Return how often the simulated driver convicted this process; 0 on a real one."""
    loaded = ctypes.CDLL(library)
    return int(loaded.kvxsim_convictions_count()) if hasattr(loaded, "kvxsim_reset") else 0


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))

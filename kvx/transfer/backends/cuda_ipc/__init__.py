"""Device memory between two processes of one host, by copy engines.

The owner of memory exports it, once a region: by IPC handle, or by the descriptor of memory that
was mapped for that. A peer opens it once and copies from it as often as leases allow. Only the
owner of the target copies: the reader of a read, the receiver of a write. So nothing of ours is
ever written by anybody else's device, and what is in flight is always known here.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvx.buffers import MemoryKind
from kvx.transfer.backends.cuda_ipc.endpoint import CudaIpcEndpoint
from kvx.transfer.backends.device.driver import why_no_driver

if TYPE_CHECKING:
    from kvx.transfer.backend import BackendHost


class CudaIpcBackend:
    """See `kvx.transfer.backend.Backend`."""

    name = "cuda-ipc"
    rank = 15
    kinds = frozenset({MemoryKind.HOST, MemoryKind.DEVICE})

    def availability(self) -> str:
        """Return why there is no driver; empty when there is one.

        Devices are opened when memory of one is first met: until then a process may still fork.
        """
        return why_no_driver()

    def open(self, host: BackendHost) -> CudaIpcEndpoint:
        """Return an agent's end of it."""
        return CudaIpcEndpoint(host)


def backend() -> CudaIpcBackend:
    """Return the backend."""
    return CudaIpcBackend()

"""Device memory to and from peers that no copy engine reaches, through pinned host memory.

The native ways (shm, tcp) carry the bytes between host memories, verified as always; this moves
them on between host memory and a device, some while others are on their way. What comes from a
peer is verified before it is sent to the device.

    read    device <- leased host memory of a peer           here
    write   device -> leased host memory of a peer           here
    write   host   -> leased device memory of a peer         there: the receiver reads from us

Device memory of a peer elsewhere is read from a lease with ``staged=True``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvx.buffers import MemoryKind
from kvx.transfer.backends.cuda_staged.endpoint import CudaStagedEndpoint
from kvx.transfer.backends.device.driver import why_no_driver

if TYPE_CHECKING:
    from kvx.transfer.backend import BackendHost


class CudaStagedBackend:
    """See `kvx.transfer.backend.Backend`."""

    name = "cuda-staged"
    rank = 200
    kinds = frozenset({MemoryKind.HOST, MemoryKind.DEVICE})

    def availability(self) -> str:
        """Return nothing: host memory needs no driver, and device memory is asked for then."""
        return why_no_driver()

    def open(self, host: BackendHost) -> CudaStagedEndpoint:
        """Return an agent's end of it."""
        return CudaStagedEndpoint(host)


def backend() -> CudaStagedBackend:
    """Return the backend."""
    return CudaStagedBackend()

"""NIXL as a backend: RDMA and NVLink where there are any, with what NIXL itself does not give.

NIXL moves bytes fast and leaves the rest to its user. Here it gets deadlines that hold for a frozen
peer, memory that stays quarantined until NIXL is through with it, verified blocks, leases, and an
end for whoever is killed. `docs/guides/nixl.md` says how, and what remains.

    probe       does it load? asked in another process
    bindings    NIXL as kvx uses it
    rows        blocks into runs; pure
    prepared    a plan that NIXL has checked, and the requests of one transfer
    job         the handle of a transfer
    course      one transfer from beginning to end
    pump        the two threads
    channel     the way to one life of one peer
    messages    what two endpoints tell each other
    checking    checksums of what has moved
    owner       what peers do to our memory
    registry    our memory, and who knows of it
    endpoint    an agent's end
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvx.buffers import MemoryKind
from kvx.errors import UnavailableError
from kvx.transfer.backends.nixl import bindings, probe
from kvx.transfer.backends.nixl.endpoint import NixlEndpoint
from kvx.transfer.backends.nixl.options import NixlOptions

if TYPE_CHECKING:
    from kvx.transfer.backend import BackendHost

__all__ = ["NixlBackend", "NixlOptions"]


class NixlBackend:
    """See `kvx.transfer.backend.Backend`.

    Attributes:
        name: As agents list it.
        rank: Behind what kvx does itself on one host, before its tcp.
        kinds: Device memory moves unverified: a checksum is computed by a CPU.
    """

    name = "nixl"
    rank = 50
    kinds = frozenset({MemoryKind.HOST, MemoryKind.DEVICE})

    def __init__(self, options: NixlOptions | None = None) -> None:
        """Choose how NIXL is used; nothing is loaded yet."""
        self._options = options or NixlOptions()

    def availability(self) -> str:
        """Return why NIXL cannot be used here; empty when it can. Takes a second at first."""
        return probe.objection(self._options.backends, self._options.probe_timeout_s)

    def open(self, host: BackendHost) -> NixlEndpoint:
        """Return an agent's end of it.

        Raises:
            UnavailableError: NIXL is not here, or does not start.
        """
        why_not = self.availability()
        if why_not:
            raise UnavailableError(why_not)
        loaded = bindings.load()
        return NixlEndpoint(host, self._options, loaded, probe.version_of(probe.module_name()))

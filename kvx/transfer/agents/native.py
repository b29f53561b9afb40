"""Makes native cores; the one place of the agents that names the extension's classes."""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

from kvx_ext import _core

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from kvx.transfer.core import LinkCore, NativePlan


class NativeMaker:
    """See `CoreMaker`."""

    def agent(
        self,
        *,
        io_threads: int,
        copy_threads: int,
        greeting_s: float,
        ping_s: float,
        piece_bytes: int,
        cancel_grace_s: float,
    ) -> LinkCore:
        """Return a new core."""
        # To Python a TLS context is opaque, and the native plan and context are each other's only.
        core = _core.LinkAgent(
            io_threads=io_threads,
            copy_threads=copy_threads,
            greeting_s=greeting_s,
            ping_s=ping_s,
            piece_bytes=piece_bytes,
            cancel_grace_s=cancel_grace_s,
        )
        return cast("LinkCore", core)

    def pair(self, one: LinkCore, other: LinkCore) -> tuple[int, int]:
        """Join two cores of this process."""
        return _core.LinkAgent.pair(cast("_core.LinkAgent", one), cast("_core.LinkAgent", other))

    def plan(
        self,
        core: LinkCore,
        *,
        region: int,
        local: npt.NDArray[np.int64],
        remote_region: int,
        remote: npt.NDArray[np.int64],
        indices: npt.NDArray[np.uint32] | None,
        checksums: npt.NDArray[np.uint64] | None,
        keys: npt.NDArray[np.uint8] | None,
    ) -> NativePlan:
        """Check both sides of a transfer against each other."""
        return _core.RemotePlan(
            cast("_core.LinkAgent", core),
            region, local, remote_region, remote, indices, checksums, keys,
        )  # fmt: skip

    def tls(self, certificate: str, private_key: str, authority: str) -> object:
        """Return a context for TLS connections."""
        return _core.TlsContext(certificate, private_key, authority)

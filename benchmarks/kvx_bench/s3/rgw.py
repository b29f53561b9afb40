"""A real S3 server for one run: Ceph RGW over memory, at a loopback address of its own."""

from __future__ import annotations

from typing import Self

from kvx_bench.s3.ceph import why_not
from kvx_bench.s3.service import Keys, Service
from kvx_bench.transfer.child import Child

_START_S = 180.0


class Rgw:
    """One that is there from the constructor on until `close`, or until this process has ended.

    Attributes:
        service: Where it is.
    """

    why_not = staticmethod(why_not)

    def __init__(self, *, memory_bytes: int = 3 << 30) -> None:
        """Start it: 7 s.

        Args:
            memory_bytes: Most that it stores.

        Raises:
            UnavailableError: It does not start; with what it said.
        """
        self._keeper = Child.of_module("kvx_bench.s3.rgw_keeper")
        self._keeper.socket.settimeout(_START_S)
        try:
            found = self._keeper.ask(do="start", memory_bytes=memory_bytes)
        except BaseException:
            self.close()
            raise
        self.service = Service(**found | {"keys": Keys(**found["keys"])})

    def __enter__(self) -> Self:
        """Nothing but the server."""
        return self

    def __exit__(self, *exception: object) -> None:
        """End it."""
        self.close()

    @property
    def pid(self) -> int:
        """Of the process that all of it belongs to."""
        return self._keeper.pid

    def close(self) -> None:
        """End it, and remove what it stored."""
        self._keeper.close()

"""A longer line to a server, in a process of its own."""

from __future__ import annotations

import contextlib
from dataclasses import replace
from typing import TYPE_CHECKING, Self

from kvx.errors import UnavailableError
from kvx_bench.transfer.child import Child

if TYPE_CHECKING:
    from collections.abc import Iterator

    from kvx_bench.s3.service import Service


class DelayedLine:
    """Where a server can be reached through a line that takes longer, or stands still.

    Attributes:
        service: The same server, for the same keys.
    """

    def __init__(self, server: Service, *, delay_s: float = 0.0) -> None:
        """Begin to listen.

        Args:
            server: Who is at the other end.
            delay_s: What a round trip takes longer.

        Raises:
            UnavailableError: It speaks TLS: its certificate is for another address than the line's.
        """
        if server.is_tls:
            raise UnavailableError(f"{server.url} speaks TLS, which allows nobody in between")
        host, port = server.address
        self._child = Child.of_module("kvx_bench.s3.delay_proxy")
        try:
            found = self._child.ask(do="listen", host=host, port=port)
            self._child.ask(do="delay", seconds=delay_s)
        except BaseException:
            self.close()
            raise
        self.service = replace(server, url=f"http://127.0.0.1:{found['port']}")

    def __enter__(self) -> Self:
        """Nothing but the line."""
        return self

    def __exit__(self, *exception: object) -> None:
        """End it."""
        self.close()

    @contextlib.contextmanager
    def frozen(self) -> Iterator[None]:
        """Let nothing through, in either direction."""
        self._child.ask(do="freeze")
        try:
            yield
        finally:
            self._child.ask(do="thaw")

    def close(self) -> None:
        """Cut all connections."""
        self._child.close()

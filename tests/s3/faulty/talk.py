"""One connection of a client to the proxy, and the one behind it to the server."""

from __future__ import annotations

import asyncio
import random
import socket
import ssl
import struct
from dataclasses import replace
from typing import NoReturn, Protocol

from kvx_bench.s3.service import Service
from tests.s3.faulty.faults import Fault, Late
from tests.s3.faulty.message import (
    HEAD_BYTES_MAX,
    Request,
    Response,
    read_request,
    read_response,
)

_PIECE_BYTES = 64 << 10
_NOTHING_WRONG: Fault = Late(0.0)
_RESET_ON_CLOSE = struct.pack("ii", 1, 0)


class Line(Protocol):
    """What a talk needs of the proxy."""

    @property
    def server(self) -> Service:
        """Who is asked."""

    @property
    def moving(self) -> asyncio.Event:
        """Set unless the line is frozen."""

    @property
    def thawed(self) -> asyncio.Event:
        """Set when exchanges that stand still are to go on."""

    def begin(self, request: Request) -> tuple[Fault | None, random.Random]:
        """Note a request; returns what is to go wrong with it, and the dice for that."""

    def end(self) -> None:
        """Note that the client has taken the whole answer to what this task began last."""


class _EndedError(Exception):
    """The talk is over, as a fault wanted it."""


class Talk:
    """Requests of one client, one after the other; the exchange that faults have in their hands.

    Attributes:
        request: The one that is being answered.
        dice: For what the fault leaves open.
    """

    request: Request
    dice: random.Random

    def __init__(
        self, line: Line, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        """Nothing is read before `run`."""
        self._line = line
        self._reader = reader
        self._writer = writer
        self._server: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None
        # So that `drain` comes back when the kernel has everything. With 0 for high a transport
        # over TLS pauses while it has nothing.
        writer.transport.set_write_buffer_limits(high=1, low=0)

    async def run(self) -> None:
        """Answer until one side hangs up."""
        try:
            while True:
                await self._line.moving.wait()
                request = await read_request(self._reader, self._writer)
                if request is None:
                    return
                self.request = request
                fault, self.dice = self._line.begin(request)
                await (fault or _NOTHING_WRONG).play(self)
                self._line.end()
        except (_EndedError, ConnectionError, asyncio.IncompleteReadError, ssl.SSLError):
            pass  # the end of this talk, whichever side it came from
        finally:
            self._writer.close()
            self._hang_up_on_server()

    async def forward(self, *, body: bytes | None = None) -> Response:
        """Ask the server; with another body if there is one."""
        await self._line.moving.wait()
        asked = self.request if body is None else replace(self.request, body=body)
        was_used = self._server is not None
        try:
            return await self._ask(asked)
        except ConnectionError:
            # It closes connections that have been idle, which is no fault that anybody asked for.
            if not was_used:
                raise
            self._hang_up_on_server()
            return await self._ask(asked)

    async def send(self, data: bytes) -> None:
        """Send the client some bytes.

        Raises:
            ConnectionError: It has left.
        """
        for first in range(0, len(data), _PIECE_BYTES):
            await self._line.moving.wait()
            if self._reader.at_eof():
                raise ConnectionAbortedError("the client has left")
            self._writer.write(data[first : first + _PIECE_BYTES])
            await self._writer.drain()

    async def sleep(self, seconds: float) -> None:
        """Let time pass."""
        await asyncio.sleep(seconds)

    async def stand_still(self) -> None:
        """Do nothing until the proxy is thawed, or closed."""
        await self._line.thawed.wait()

    def hang_up(self) -> NoReturn:
        """Close the connection in good order."""
        raise _EndedError

    def reset(self) -> NoReturn:
        """Cut the connection."""
        cut(self._writer)
        raise _EndedError

    def _hang_up_on_server(self) -> None:
        if self._server is not None:
            self._server[1].close()
            self._server = None

    async def _ask(self, asked: Request) -> Response:
        if self._server is None:
            host, port = self._line.server.address
            self._server = await asyncio.open_connection(
                host, port, limit=HEAD_BYTES_MAX, ssl=self._line.server.is_tls or None
            )
        reader, writer = self._server
        writer.write(asked.encoded())
        await writer.drain()
        response = await read_response(reader, asked.method)
        if response.is_last:
            self._hang_up_on_server()
        return response


def cut(writer: asyncio.StreamWriter) -> None:
    """Close a connection so that the other side is told it was reset."""
    if not writer.transport.is_closing():
        line = writer.get_extra_info("socket")
        line.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET_ON_CLOSE)
    writer.transport.abort()

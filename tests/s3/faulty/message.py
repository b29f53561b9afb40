"""HTTP/1.1 as far as S3 uses it: messages that are read whole and written in pieces."""

from __future__ import annotations

import asyncio
import http
import re
from dataclasses import dataclass, replace
from typing import Self
from urllib.parse import unquote

HEAD_BYTES_MAX = 1 << 20
_BODILESS = {http.HTTPStatus.NO_CONTENT, http.HTTPStatus.NOT_MODIFIED}

Headers = tuple[tuple[str, str], ...]


@dataclass(frozen=True, slots=True)
class Request:
    """What a client asks.

    Attributes:
        method: Of it.
        target: Path and query, as they came.
        headers: As they came.
        body: All of it.
        attempt: How often the same has been asked for, this time included.
    """

    method: str
    target: str
    headers: Headers
    body: bytes
    attempt: int = 1

    @property
    def name(self) -> str:
        """Of the object; empty where it is about none."""
        path = unquote(self.target.partition("?")[0])
        return path.removeprefix("/").partition("/")[2]

    @property
    def span(self) -> tuple[int, int] | None:
        """First and last byte that are asked for; None for all."""
        found = re.fullmatch(r"bytes=(\d+)-(\d+)", value(self.headers, "range") or "")
        return (int(found[1]), int(found[2])) if found else None

    @property
    def identity(self) -> str:
        """The same for each attempt at the same."""
        return f"{self.method} {self.target} {self.span}"

    def encoded(self) -> bytes:
        """Return it as it goes to the server, on a connection that stays."""
        headers = without(self.headers, "expect", "connection")
        is_chunked = value(headers, "transfer-encoding") is not None
        body = _as_chunks(self.body) if is_chunked else self.body
        return _head(f"{self.method} {self.target} HTTP/1.1", headers) + body


@dataclass(frozen=True, slots=True)
class Response:
    """What a server answers.

    Attributes:
        status: Code and reason.
        headers: With the length of the body, which a fault may have left wrong.
        body: All of it.
        is_last: Whether the server takes no more requests on the connection it came on.
    """

    status: str
    headers: Headers
    body: bytes
    is_last: bool = False

    def with_header(self, name: str, text: str) -> Self:
        """Return it with one header set."""
        return replace(self, headers=(*without(self.headers, name), (name, text)))

    def with_body(self, body: bytes) -> Self:
        """Return it with another body, and the length of that."""
        return replace(self, body=body).with_header("Content-Length", str(len(body)))

    def head(self) -> bytes:
        """Return all but the body as it goes to the client."""
        return _head(f"HTTP/1.1 {self.status}", self.headers)


def value(headers: Headers, name: str) -> str | None:
    """Return a header; None where it is not."""
    return next((text for key, text in headers if key.lower() == name), None)


def without(headers: Headers, *names: str) -> Headers:
    """Return the others."""
    refused = {name.lower() for name in names}
    return tuple((key, text) for key, text in headers if key.lower() not in refused)


async def read_request(
    reader: asyncio.StreamReader, writer: asyncio.StreamWriter
) -> Request | None:
    """Return the next one; None when the client has hung up. Tells it to go on if it asks."""
    head = await _read_head(reader)
    if head is None:
        return None
    method, target, _ = head[0].split(" ")
    if (value(head[1], "expect") or "").lower() == "100-continue":
        writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
    return Request(method, target, head[1], await _read_body(reader, head[1]))


async def read_response(reader: asyncio.StreamReader, method: str) -> Response:
    """Return the answer to a request, without what was about the connection it came on.

    Raises:
        ConnectionError: The server hung up.
    """
    head = await _read_head(reader)
    if head is None:
        raise ConnectionError("the server hung up instead of answering")
    status = head[0].partition(" ")[2]
    code = int(status[:3])
    if code < http.HTTPStatus.OK:
        return await read_response(reader, method)
    headers = without(head[1], "connection", "keep-alive", "transfer-encoding")
    is_last = (value(head[1], "connection") or "").lower() == "close"
    if method == "HEAD" or code in _BODILESS:
        return Response(status, headers, b"", is_last)
    is_whole_line = value(head[1], "content-length") is value(head[1], "transfer-encoding") is None
    body = await (reader.read() if is_whole_line else _read_body(reader, head[1]))
    return Response(status, headers, b"", is_last).with_body(body)


async def _read_head(reader: asyncio.StreamReader) -> tuple[str, Headers] | None:
    try:
        head = await reader.readuntil(b"\r\n\r\n")
    except asyncio.IncompleteReadError:
        return None
    first, *lines = head[:-4].decode("latin-1").split("\r\n")
    fields = (line.partition(":") for line in lines)
    return first, tuple((name, text.strip()) for name, _, text in fields)


async def _read_body(reader: asyncio.StreamReader, headers: Headers) -> bytes:
    if value(headers, "transfer-encoding") is None:
        return await reader.readexactly(int(value(headers, "content-length") or 0))
    parts = []
    while size := int((await reader.readuntil(b"\r\n")).partition(b";")[0], 16):
        parts.append(await reader.readexactly(size))
        await reader.readexactly(2)
    while await reader.readuntil(b"\r\n") != b"\r\n":
        pass  # trailers: of the transport, which ends here
    return b"".join(parts)


def _as_chunks(body: bytes) -> bytes:
    whole = b"%x\r\n%b\r\n" % (len(body), body) if body else b""
    return whole + b"0\r\n\r\n"


def _head(first: str, headers: Headers) -> bytes:
    lines = (first, *(f"{name}: {text}" for name, text in headers))
    return ("\r\n".join(lines) + "\r\n\r\n").encode("latin-1")

"""An HTTP server on loopback that answers what it is told to, however wrong, and ends as badly."""

from __future__ import annotations

import enum
import socket
import ssl
import struct
import threading
from collections import deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from pathlib import Path

DATE = "Sat, 21 Nov 2026 12:00:00 GMT"


class Ending(enum.Enum):
    """What becomes of the connection after an answer."""

    KEEP = enum.auto()
    CLOSE = enum.auto()
    RESET = enum.auto()
    HOLD = enum.auto()


@dataclass(frozen=True, slots=True)
class Answer:
    """One answer.

    Attributes:
        status: Number and reason.
        body: What is sent after the head.
        headers: Besides Content-Length.
        announced: Content-Length; None for the truth.
        ending: What happens then.
        raw: Sent instead of all that; None to send all that.
    """

    status: str = "200 OK"
    body: bytes = b""
    headers: tuple[str, ...] = ()
    announced: int | None = None
    ending: Ending = Ending.KEEP
    raw: bytes | None = None

    def bytes_for(self, verb: str) -> bytes:
        """Return what goes over the wire."""
        if self.raw is not None:
            return self.raw
        length = len(self.body) if self.announced is None else self.announced
        lines = [f"HTTP/1.1 {self.status}", *self.headers, f"Content-Length: {length}", "", ""]
        return "\r\n".join(lines).encode() + (b"" if verb == "HEAD" else self.body)


def refusal(status: str, code: str = "", message: str = "as told") -> Answer:
    """Return an error as S3 answers it."""
    body = f"<Error><Code>{code}</Code><Message>{message}</Message></Error>" if code else ""
    return Answer(status, body.encode())


def part(body: bytes, start: int, total: int, **facts: object) -> Answer:
    """Return an answer to a ranged GET."""
    headers = (f"Content-Range: bytes {start}-{start + len(body) - 1}/{total}", *MARKS)
    return Answer("206 Partial Content", body, headers, **facts)


MARKS = (f"Last-Modified: {DATE}", 'ETag: "1"')
SILENCE = Answer(raw=b"", ending=Ending.HOLD)


class Request(NamedTuple):
    """What was asked: the method, the path with the query, and the head as it came."""

    verb: str
    path: str
    head: str
    body: bytes


@dataclass
class BadServer:
    """Gives one answer after the other, and the last of them for ever.

    Attributes:
        answers: What is answered, from the left.
        certificate: PEM file of certificate and key; None for no TLS.
        requests: What was asked.
        num_gone: Connections that ended while they were answered.
    """

    answers: deque[Answer]
    certificate: Path | None = None
    requests: list[Request] = field(default_factory=list)
    num_gone: int = 0

    def __post_init__(self) -> None:
        """Listen."""
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=256)
        self._stopped = threading.Event()
        self._open: set[socket.socket] = set()
        self._lock = threading.Lock()
        threading.Thread(target=self._accept, daemon=True).start()

    @property
    def endpoint(self) -> str:
        scheme = "https" if self.certificate else "http"
        return f"{scheme}://127.0.0.1:{self._listener.getsockname()[1]}"

    @property
    def num_open(self) -> int:
        return len(self._open)

    def close(self) -> None:
        """Stop answering, and cut those who wait for it."""
        self._stopped.set()
        self._listener.close()
        with self._lock:
            for connection in self._open:
                connection.shutdown(socket.SHUT_RDWR)

    def _accept(self) -> None:
        context = None
        if self.certificate:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(self.certificate)
        while not self._stopped.is_set():
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            threading.Thread(target=self._serve, args=(connection, context), daemon=True).start()

    def _serve(self, connection: socket.socket, context: ssl.SSLContext | None) -> None:
        try:
            if context is not None:
                connection = context.wrap_socket(connection, server_side=True)
        except (ssl.SSLError, OSError):
            connection.close()
            return
        with self._lock:
            self._open.add(connection)
        try:
            while self._answer(connection):
                pass
        except OSError:
            self.num_gone += 1
        finally:
            with self._lock:
                self._open.discard(connection)
            connection.close()

    def _answer(self, connection: socket.socket) -> bool:
        """Answer one request; return whether another may follow."""
        request = _read(connection)
        if request is None:
            return False
        with self._lock:
            self.requests.append(request)
            answer = self.answers.popleft() if len(self.answers) > 1 else self.answers[0]
        connection.sendall(answer.bytes_for(request.verb))
        if answer.ending is Ending.HOLD:
            while connection.recv(1 << 16):
                pass
        if answer.ending is Ending.RESET:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        return answer.ending is Ending.KEEP


def _read(connection: socket.socket) -> Request | None:
    """Return the next request; None when the other side has closed."""
    got = b""
    while b"\r\n\r\n" not in got:
        more = connection.recv(1 << 16)
        if not more:
            return None
        got += more
        if got.startswith(b"\x16"):
            return Request("TLS", "", "", got)
    head, _, body = got.partition(b"\r\n\r\n")
    lines = head.decode().split("\r\n")
    verb, path, _ = lines[0].split(" ", 2)
    fields = dict(line.lower().split(": ", 1) for line in lines[1:])
    while len(body) < int(fields.get("content-length", "0")):
        body += connection.recv(1 << 16)
    return Request(verb, path, head.decode(), body)

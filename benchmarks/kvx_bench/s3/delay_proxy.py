"""The process of a longer line: TCP through pipes, so that no byte of a body is copied by it.

What a client sends waits for the delay when it is the first since the server spoke, and for twice
that when it is the first of a connection, as if that had taken a round trip to make. What follows
on it flows: a long line delays, it is not narrow. Answers are passed on at once: a round trip has
one delay in it.
"""

from __future__ import annotations

import fcntl
import heapq
import json
import os
import select
import socket
import sys
import time
from typing import Any

_PIPE_BYTES = 1 << 20
_BACKLOG = 512
_FLAGS = os.SPLICE_F_MOVE | os.SPLICE_F_NONBLOCK
_EVENTS = select.EPOLLIN | select.EPOLLOUT | select.EPOLLRDHUP | select.EPOLLET


class _End:
    """One side's socket, and what the kernel last said of it: it tells of changes only."""

    def __init__(self, line: socket.socket) -> None:
        self.line = line
        self.fd = line.fileno()
        self.has_bytes = self.has_room = True

    def note(self, events: int) -> None:
        """Note what the kernel says."""
        self.has_bytes = self.has_bytes or bool(events & ~select.EPOLLOUT)
        self.has_room = self.has_room or bool(events & ~select.EPOLLIN)


class _Way:
    """One direction of a connection, with what is under way in it."""

    def __init__(self, source: _End, target: _End) -> None:
        self._source, self._target = source, target
        self._out, self._in = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        fcntl.fcntl(self._in, fcntl.F_SETPIPE_SZ, _PIPE_BYTES)
        self._held = 0
        self._has_ended = False
        self.released_at = 0.0

    def take(self) -> int:
        """Take from the source what there is room for; returns how many bytes."""
        if not self._source.has_bytes or self._held >= _PIPE_BYTES:
            return 0
        try:
            count = os.splice(self._source.fd, self._in, _PIPE_BYTES - self._held, flags=_FLAGS)
        except BlockingIOError:
            # It has none, unless it is the pipe that is full: of bytes, or of pieces.
            self._source.has_bytes = self._held > 0
            return 0
        self._has_ended = count == 0
        self._source.has_bytes = not self._has_ended
        self._held += count
        return count

    def give(self) -> int:
        """Give the target what it takes; returns how many bytes."""
        if not self._held or not self._target.has_room or time.monotonic() < self.released_at:
            return 0
        try:
            count = os.splice(self._out, self._target.fd, self._held, flags=_FLAGS)
        except BlockingIOError:
            self._target.has_room = False
            return 0
        self._held -= count
        return count

    def is_over(self) -> bool:
        """Say so when nothing comes any more, and nothing is left."""
        return self._has_ended and not self._held

    def close(self) -> None:
        """Forget what is under way."""
        os.close(self._out)
        os.close(self._in)


class _Connection:
    """A client's, and the one behind it."""

    def __init__(self, client: socket.socket, server: socket.socket) -> None:
        self.ends = (_End(client), _End(server))
        self._up, self._down = _Way(*self.ends), _Way(*self.ends[::-1])
        self._is_new = self._is_turn = True
        self._is_ending = False

    def pump(self, delay_s: float) -> float | None:
        """Move what can be moved; returns when to try again by itself, if at all.

        Raises:
            ConnectionError: It is over, or one side is gone.
        """
        while True:
            taken = self._up.take()
            if taken and self._is_turn:
                self._up.released_at = time.monotonic() + delay_s * (2 if self._is_new else 1)
                self._is_new = self._is_turn = False
            given = self._up.give()
            answered = self._down.take()
            self._is_turn = self._is_turn or answered > 0
            if not taken + given + answered + self._down.give():
                break
        if self._down.is_over():
            raise ConnectionResetError("the server has ended, and all of it is delivered")
        if self._up.is_over() and not self._is_ending:
            self._is_ending = True
            self.ends[1].line.shutdown(socket.SHUT_WR)
        return self._up.released_at if self._up.released_at > time.monotonic() else None

    def close(self) -> None:
        """End it."""
        for end in self.ends:
            end.line.close()
        self._up.close()
        self._down.close()


class _Proxy:
    """All connections, and the line of whoever started this."""

    def __init__(self, control: socket.socket) -> None:
        self._control = control
        self._lines = control.makefile("rb")
        self._epoll = select.epoll()
        self._epoll.register(control, select.EPOLLIN)
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=_BACKLOG)
        self._listener.settimeout(0.0)
        self._connections: dict[int, tuple[_End, _Connection]] = {}
        self._due: list[tuple[float, int]] = []
        self._server = ("", 0)
        self._delay_s = 0.0
        self._is_frozen = False

    def run(self) -> None:
        """Serve until whoever started this hangs up."""
        while True:
            for fd, events in self._epoll.poll(self._patience_s()):
                if fd == self._control.fileno():
                    line = self._lines.readline()
                    if not line:
                        return
                    answer = self._answer(json.loads(line))
                    self._control.sendall(json.dumps(answer).encode() + b"\n")
                elif fd == self._listener.fileno():
                    self._accept()
                elif fd in self._connections:
                    end, _ = self._connections[fd]
                    end.note(events)
                    self._pump(fd)
            while self._due and self._due[0][0] <= time.monotonic():
                self._pump(heapq.heappop(self._due)[1])

    def _patience_s(self) -> float | None:
        return max(0.0, self._due[0][0] - time.monotonic()) if self._due else None

    def _answer(self, request: dict[str, Any]) -> dict[str, object]:
        match request["do"]:
            case "listen":
                self._server = (request["host"], request["port"])
                self._epoll.register(self._listener, select.EPOLLIN)
                return {"port": self._listener.getsockname()[1]}
            case "delay":
                self._delay_s = request["seconds"]
            case "freeze":
                self._is_frozen = True
            case "thaw":
                self._is_frozen = False
                for fd in tuple(self._connections):
                    self._pump(fd)
        return {}

    def _accept(self) -> None:
        client, _ = self._listener.accept()
        try:
            server = socket.create_connection(self._server)
        except OSError:
            client.close()
            return
        for one in (client, server):
            one.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            one.settimeout(0.0)
        connection = _Connection(client, server)
        for end in connection.ends:
            self._connections[end.fd] = (end, connection)
            self._epoll.register(end.fd, _EVENTS)

    def _pump(self, fd: int) -> None:
        _, connection = self._connections.get(fd, (None, None))
        if connection is None or self._is_frozen:
            return
        try:
            due = connection.pump(self._delay_s)
        except ConnectionError:
            for end in connection.ends:
                self._epoll.unregister(end.fd)
                del self._connections[end.fd]
            connection.close()
            return
        if due is not None:
            heapq.heappush(self._due, (due, fd))


if __name__ == "__main__":
    with socket.socket(fileno=int(sys.argv[-1])) as ours:
        _Proxy(ours).run()

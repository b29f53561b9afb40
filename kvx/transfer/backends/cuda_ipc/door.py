"""Where descriptors of device memory come in, and by which others see that somebody is at home.

A door is a datagram socket of this host without a file. Its name is random and goes to peers only.
The kernel closes it with the process: whoever finds it gone knows that nothing behind it has any
memory mapped, also when the agent was closed without a connection to say so over.
"""

from __future__ import annotations

import array
import contextlib
import errno
import os
import secrets
import socket
import struct
import threading

from kvx.errors import CapacityError, UnavailableError

_TOKEN_BYTES = 16
_WAITING_MAX = 64
_CREDENTIALS = struct.Struct("3i")


class Door:
    """One end of it. Thread-safe.

    Attributes:
        name: What others reach it by.
    """

    def __init__(self) -> None:
        """Open it."""
        self.name = f"kvx-{secrets.token_hex(16)}"
        self._lock = threading.Lock()
        self._waiting: dict[bytes, int] = {}
        self._socket = _datagrams()
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
        self._socket.bind(_address(self.name))

    def take(self, token: bytes) -> int:
        """Return the descriptor that came with a token; the caller closes it.

        Raises:
            UnavailableError: None has come.
        """
        with self._lock:
            self._receive()
            fd = self._waiting.pop(token, -1)
        if fd < 0:
            raise UnavailableError(
                "the descriptor of the memory did not come: both processes must share a network "
                "namespace and a user"
            )
        return fd

    def close(self) -> None:
        """Close it, and what was not taken."""
        with self._lock:
            self._socket.close()
            for fd in self._waiting.values():
                os.close(fd)
            self._waiting.clear()

    def _receive(self) -> None:
        room = socket.CMSG_SPACE(struct.calcsize("i")) + socket.CMSG_SPACE(_CREDENTIALS.size)
        while True:
            try:
                token, extra, _, _ = self._socket.recvmsg(
                    _TOKEN_BYTES, room, socket.MSG_CMSG_CLOEXEC
                )
            except BlockingIOError:
                return
            fds, is_ours = _parts_of(extra)
            if not is_ours or len(fds) != 1 or len(token) != _TOKEN_BYTES:
                for fd in fds:
                    os.close(fd)
                continue
            while len(self._waiting) >= _WAITING_MAX:
                os.close(self._waiting.pop(next(iter(self._waiting))))
            self._waiting[token] = fds[0]


class Doors:
    """A door for each life of a peer: closed when nothing of it is mapped any more. Thread-safe."""

    def __init__(self) -> None:
        """Open none yet."""
        self._lock = threading.Lock()
        self._doors: dict[tuple[str, int], Door] = {}

    def to(self, peer: str, life: int) -> Door:
        """Return the door that a life of a peer is told."""
        with self._lock:
            if (peer, life) not in self._doors:
                self._doors[peer, life] = Door()
            return self._doors[peer, life]

    def names(self, peer: str) -> list[str]:
        """Return what a peer was told."""
        with self._lock:
            return [door.name for (name, _), door in self._doors.items() if name == peer]

    def close(self, peer: str, life: int) -> None:
        """Close one. REQUIRES: nothing of that life is mapped."""
        with self._lock:
            door = self._doors.pop((peer, life), None)
        if door is not None:
            door.close()

    def close_all(self) -> None:
        """Close them all. REQUIRES: nothing is mapped."""
        with self._lock:
            doors, self._doors = list(self._doors.values()), {}
        for door in doors:
            door.close()


def hand_over(door: str, fd: int) -> bytes:
    """Send a descriptor through a door; returns the token that it is taken by. Never blocks.

    Raises:
        UnavailableError: There is no such door in this network namespace.
        CapacityError: Nobody takes what was sent before.
    """
    token = secrets.token_bytes(_TOKEN_BYTES)
    with _datagrams() as sender:
        try:
            sender.connect(_address(door))
            sender.sendmsg(
                [token], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [fd]))]
            )
        except BlockingIOError:
            raise CapacityError("the peer takes no descriptors: it may be frozen") from None
        except (ConnectionRefusedError, FileNotFoundError) as error:
            raise UnavailableError(
                f"the peer's door is not to be found ({error.strerror}): both processes must share "
                "a network namespace"
            ) from None
    return token


def is_there(door: str) -> bool:
    """Return whether somebody is behind a door."""
    with _datagrams() as probe:
        return probe.connect_ex(_address(door)) not in (errno.ECONNREFUSED, errno.ENOENT)


def _datagrams() -> socket.socket:
    return socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK)


def _address(name: str) -> bytes:
    return b"\0" + name.encode()


def _parts_of(extra: list[tuple[int, int, bytes]]) -> tuple[list[int], bool]:
    """Return the descriptors that came with a datagram, and whether this user sent it."""
    fds: list[int] = []
    is_ours = False
    for _, kind, data in extra:
        if kind == socket.SCM_RIGHTS:
            whole = len(data) - len(data) % struct.calcsize("i")
            fds += array.array("i", data[:whole])
        elif kind == socket.SCM_CREDENTIALS:
            with contextlib.suppress(struct.error):
                is_ours = _CREDENTIALS.unpack(data[: _CREDENTIALS.size])[1] == os.getuid()
    return fds, is_ours

"""The wire between a scheduler and one of its workers: framed messages over a unix socket.

Both are one engine of one user on one machine: whoever has another uid is refused. A frame is its
length, 4 bytes little endian, and one message in msgpack. Nothing here blocks.
"""

from __future__ import annotations

import os
import socket
import struct
from typing import TYPE_CHECKING

import msgspec

import kvx

if TYPE_CHECKING:
    from pathlib import Path

_LENGTH = struct.Struct("<I")
_CREDENTIALS = struct.Struct("3i")  # pid, uid, gid: struct ucred
# A prompt of 10 million tokens in blocks of 16 has hashes of 20 MB.
MESSAGE_BYTES_MAX = 64 << 20
_READ_BYTES = 1 << 20


class Locate(msgspec.Struct, tag=1, array_like=True, frozen=True):
    """Asks where blocks are.

    Attributes:
        number: Of the question.
        life: Of the cache: it is reset for a new one.
        group: Place among the connector's groups.
        first: How many of the hashes are not asked for.
        hashes: From the start of the prompt.
    """

    number: int
    life: int
    group: int
    first: int
    hashes: list[bytes]


class Begin(msgspec.Struct, tag=2, array_like=True, frozen=True):
    """Begins a life of the cache: nothing that was stored before is found.

    Attributes:
        life: Its number.
    """

    life: int


class Located(msgspec.Struct, tag=3, array_like=True, frozen=True):
    """Answers `Locate`.

    Attributes:
        number: Of the question.
        tiers: One byte for each block asked for: its `kvx.TierKind`.
        reason: Why the first that is not held is not.
        is_final: False while S3 has not said.
    """

    number: int
    tiers: bytes
    reason: kvx.MissReason
    is_final: bool

    def __post_init__(self) -> None:
        """Refuse tiers that there are not."""
        if max(self.tiers, default=0) > max(kvx.TierKind):
            raise ValueError(f"there is no tier {max(self.tiers)}")


Message = Locate | Begin | Located
_encode = msgspec.msgpack.Encoder().encode
_decode = msgspec.msgpack.Decoder(Message).decode


class Link:
    """One end of a connection. Not thread-safe; every OSError says that it is over."""

    def __init__(self, connected: socket.socket) -> None:
        """Take over a connected socket.

        Raises:
            PermissionError: The other end is another user's.
        """
        connected.settimeout(0.0)
        self._socket = connected
        self._received = bytearray()
        self._unsent = bytearray()
        peer = connected.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
        _, uid, _ = _CREDENTIALS.unpack(peer)
        if uid != os.geteuid():
            connected.close()
            raise PermissionError(f"the other end runs as uid {uid}, this one as {os.geteuid()}")

    @classmethod
    def to(cls, path: Path) -> Link:
        """Connect to who listens on a socket file.

        Raises:
            OSError: Nobody does, or another user.
        """
        connecting = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        try:
            connecting.connect(str(path))
        except OSError:
            connecting.close()
            raise
        return cls(connecting)

    def fileno(self) -> int:
        """Return the socket's, for selectors."""
        return self._socket.fileno()

    @property
    def unsent_bytes(self) -> int:
        """How much the other end has not taken yet."""
        return len(self._unsent)

    def send(self, message: Message) -> None:
        """Send a message, or what the other end takes of it now.

        Raises:
            OSError: The connection is over.
        """
        body = _encode(message)
        if len(self._unsent) + len(body) > MESSAGE_BYTES_MAX:
            raise OSError(
                f"{len(body)} bytes to send and {len(self._unsent)} are not taken; "
                f"at most {MESSAGE_BYTES_MAX} wait"
            )
        self._unsent += _LENGTH.pack(len(body))
        self._unsent += body
        self.flush()

    def flush(self) -> None:
        """Send more of what was not taken.

        Raises:
            OSError: The connection is over.
        """
        while self._unsent:
            try:
                num_sent = self._socket.send(self._unsent)
            except BlockingIOError:
                return
            del self._unsent[:num_sent]

    def receive(self) -> list[Message]:
        """Return the messages that have come.

        Raises:
            OSError: The connection is over, or the other end sent what is no message.
        """
        while True:
            try:
                got = self._socket.recv(_READ_BYTES)
            except BlockingIOError:
                break
            if not got:
                raise ConnectionResetError("the other end has closed the connection")
            self._received += got
            if len(self._received) > _LENGTH.size + MESSAGE_BYTES_MAX:
                break
        return self._take_messages()

    def close(self) -> None:
        """Close the socket."""
        self._socket.close()

    def _take_messages(self) -> list[Message]:
        messages = []
        begin = 0
        while len(self._received) - begin >= _LENGTH.size:
            (length,) = _LENGTH.unpack_from(self._received, begin)
            if length > MESSAGE_BYTES_MAX:
                raise OSError(f"a message of {length} bytes; at most {MESSAGE_BYTES_MAX}")
            end = begin + _LENGTH.size + length
            if len(self._received) < end:
                break
            body = bytes(memoryview(self._received)[begin + _LENGTH.size : end])
            try:
                messages.append(_decode(body))
            except msgspec.DecodeError as error:
                raise OSError(f"no message of kvx's: {error}") from error
            begin = end
        del self._received[:begin]
        return messages

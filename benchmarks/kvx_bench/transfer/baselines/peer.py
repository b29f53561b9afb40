"""The second process of the baselines: it has memory, and sends or takes what it is asked to."""

from __future__ import annotations

import json
import selectors
import socket
import struct
import sys
from typing import TYPE_CHECKING, Any

import kvx
from kvx_bench.copying import prefaulted

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

# What to do, bytes of a block, blocks: sent ahead over the socket that the bytes go over.
HEADER = struct.Struct("<BQQ")
SEND, TAKE, ECHO = range(3)
DONE = b"d"


def set_up(stream: socket.socket, buffer_bytes: int, congestion: str) -> None:
    """Set the options of a stream before it is connected; 0 and "" leave the kernel's choice."""
    if buffer_bytes:
        stream.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, buffer_bytes)
        stream.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, buffer_bytes)
    if stream.family == socket.AF_INET:
        stream.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if congestion:
            stream.setsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, congestion.encode())


def send_blocks(stream: socket.socket, memory: memoryview, block_bytes: int, batch: int) -> None:
    """Send the first `batch` blocks."""
    for at in range(0, batch * block_bytes, block_bytes):
        stream.sendall(memory[at : at + block_bytes])


def receive_blocks(stream: socket.socket, memory: memoryview, block_bytes: int, batch: int) -> None:
    """Receive as many blocks into place.

    Raises:
        ConnectionError: The other side hung up.
    """
    for at in range(0, batch * block_bytes, block_bytes):
        receive_exactly(stream, memory[at : at + block_bytes])


def receive_exactly(stream: socket.socket, target: memoryview) -> None:
    """Fill `target`.

    Raises:
        ConnectionError: The other side hung up.
    """
    got = 0
    while got < len(target):
        count = stream.recv_into(target[got:], 0, socket.MSG_WAITALL)
        if count == 0:
            raise ConnectionError(f"the other side hung up after {got} of {len(target)} bytes")
        got += count


class _Peer:
    """Answers requests of the control socket and of every stream in turn."""

    def __init__(self, control: socket.socket) -> None:
        self._control = control
        self._shared: kvx.MemoryRegion | None = None
        self._own: npt.NDArray[np.uint8] | None = None
        self._selector = selectors.DefaultSelector()
        self._selector.register(control, selectors.EVENT_READ)

    def run(self) -> None:
        """Serve until the other process hangs up."""
        lines = self._control.makefile("rb")
        while True:
            for key, _ in self._selector.select():
                if isinstance(key.fileobj, socket.socket) and key.fileobj is not self._control:
                    self._serve(key.fileobj)
                    continue
                line = lines.readline()
                if not line:
                    return
                self._control.sendall(json.dumps(self._answer(json.loads(line))).encode() + b"\n")

    def _answer(self, request: dict[str, Any]) -> dict[str, object]:
        match request["do"]:
            case "map":
                return self._map(request["num_bytes"])
            case "connect":
                return self._connect(request)
            case "fill":
                self._memory()[: request["num_bytes"]] = request["fill"]
                return {}
            case "look":
                part = self._memory()[: request["num_bytes"]]
                return {"lowest": int(part.min()), "highest": int(part.max())}
        return {"error": f"the second process cannot {request['do']}"}

    def _map(self, num_bytes: int) -> dict[str, object]:
        """Make memory that the other process maps too, and as much that it does not."""
        self._shared = kvx.MemoryRegion(num_bytes, is_shared=True)
        self._shared.prefault()
        self._own = prefaulted(num_bytes, fill=0)
        socket.send_fds(self._control, [b"f"], [self._shared.fd])
        return {"address": int(self._own.ctypes.data)}

    def _connect(self, request: dict[str, Any]) -> dict[str, object]:
        is_unix = isinstance(request["address"], str)
        family = socket.AF_UNIX if is_unix else socket.AF_INET
        stream = socket.socket(family, socket.SOCK_STREAM)
        set_up(stream, request["buffer_bytes"], request["congestion"])
        stream.connect(request["address"] if is_unix else tuple(request["address"]))
        self._selector.register(stream, selectors.EVENT_READ)
        return {}

    def _serve(self, stream: socket.socket) -> None:
        header = bytearray(HEADER.size)
        try:
            receive_exactly(stream, memoryview(header))
        except ConnectionError:
            self._selector.unregister(stream)
            stream.close()
            return
        what, block_bytes, batch = HEADER.unpack(header)
        memory = self._memory().data
        if what == SEND:
            send_blocks(stream, memory, block_bytes, batch)
        elif what == TAKE:
            receive_blocks(stream, memory, block_bytes, batch)
            stream.sendall(DONE)
        else:
            for _ in range(batch):
                receive_exactly(stream, memory[:block_bytes])
                stream.sendall(memory[:block_bytes])

    def _memory(self) -> npt.NDArray[np.uint8]:
        assert self._own is not None, "memory is asked for first"
        return self._own


if __name__ == "__main__":
    with socket.socket(fileno=int(sys.argv[-1])) as ours:
        _Peer(ours).run()

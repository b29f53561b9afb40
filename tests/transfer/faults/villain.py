"""A peer that knows the key, and abuses it: proper until it is trusted, then whatever it likes."""

from __future__ import annotations

import socket
import tempfile
import time
from pathlib import Path

import msgspec
import numpy as np

from kvx.transfer.agents.handshake import Handshake
from kvx.transfer.agents.identity import Identity, host_identity, new_identity
from kvx.transfer.agents.key import SharedKey
from kvx.transfer.agents.lease_token import RemoteLease, Rights
from kvx.transfer.agents.messages import OwnCard
from kvx.transfer.agents.metadata import AgentCard, encode_card
from kvx.transfer.core import LeaseRef
from tests.transfer.faults.frames import FrameSocket, Type, frame
from tests.transfer.faults.victim import KEY

_PATIENCE_S = 10.0


class Villain:
    """Listens, or dials, and greets as an agent does.

    Attributes:
        identity: Who it says it is; a new life each time.
        address: Where it listens.
        socket: To the agent, once `admit` or `dial` has returned.
        greetings: What it has sent while it was greeted.
    """

    def __init__(self, name: str = "villain", *, is_unix: bool = False, key: bytes = KEY) -> None:
        """Listen."""
        self.identity: Identity = new_identity(name)
        self.greetings: list[bytes] = []
        self._key = SharedKey(key)
        self._folder = tempfile.TemporaryDirectory(prefix="kvx-villain-")
        if is_unix:
            path = Path(self._folder.name) / "socket"
            self._listener = socket.socket(socket.AF_UNIX)
            self._listener.bind(str(path))
            self._listener.listen(4)
            self.address = f"unix:{path}"
        else:
            self._listener = socket.create_server(("127.0.0.1", 0))
            self.address = f"tcp://127.0.0.1:{self._listener.getsockname()[1]}"
        self._listener.settimeout(_PATIENCE_S)
        self._sockets: list[FrameSocket] = []

    def admit(self) -> None:
        """Take the agent that dials, and become its peer."""
        accepted, _ = self._listener.accept()
        self._begin(accepted)
        self._greet(is_dialler=False)
        self.send_card()
        assert self.socket.take_only(Type.MESSAGE) is not None, "the agent shows its card"

    def dial(self, address: str, expected: str | None = None) -> bool:
        """Become the peer of a listening agent; returns whether it agreed."""
        if address.startswith("unix:"):
            plain = socket.socket(socket.AF_UNIX)
            plain.connect(address.removeprefix("unix:"))
        else:
            host, _, port = address.removeprefix("tcp://").rpartition(":")
            plain = socket.create_connection((host, int(port)))
        self._begin(plain)
        if not self._greet(is_dialler=True, expected=expected):
            return False
        self.send_card()
        return self.socket.take_only(Type.MESSAGE) is not None

    def send_card(self) -> None:
        """Introduce itself."""
        card = AgentCard(
            self.identity,
            1,
            time.time_ns(),
            (self.address,),
            host_identity(),
            {"tcp": b"", "shm": b""},
        )
        message = OwnCard(encode_card(card, self._key))
        self.socket.send(frame(Type.MESSAGE, msgspec.msgpack.encode(message)))

    def token(self, blocks: int, block_bytes: int, checksums: list[int] | None = None) -> bytes:
        """Return a lease on memory that does not exist."""
        rows = np.array([[place * block_bytes, 0, 1, block_bytes] for place in range(blocks)])
        sums = None if checksums is None else np.array(checksums, np.uint64)
        rights = Rights.READ if checksums is not None else Rights.READ | Rights.WRITE
        return RemoteLease(
            self.identity.name, self.identity.incarnation, LeaseRef(1, 1, 1), 1,
            blocks * block_bytes, rights, 60.0, "", rows, sums,
        ).encode(self._key)  # fmt: skip

    def close(self) -> None:
        """Close everything."""
        for one in self._sockets:
            one.close()
        self._listener.close()
        self._folder.cleanup()

    def _begin(self, plain: socket.socket) -> None:
        plain.settimeout(_PATIENCE_S)
        self.socket = FrameSocket(plain)
        self._sockets.append(self.socket)

    def _greet(self, *, is_dialler: bool, expected: str | None = None) -> bool:
        handshake = Handshake(
            self.identity, self._key, is_dialler=is_dialler, is_local=True, lane=0,
            expected=expected, judge=lambda _: None,
        )  # fmt: skip
        if is_dialler:
            self._say(handshake.begin())
        while not handshake.is_over:
            heard = self.socket.take_only(Type.GREETING)
            if heard is None:
                return False
            step = handshake.receive(heard.body)
            if step.refusal is not None:
                return False
            if step.reply is not None:
                self._say(step.reply)
        return True

    def _say(self, greeting: bytes) -> None:
        self.greetings.append(greeting)
        self.socket.send(frame(Type.GREETING, greeting))

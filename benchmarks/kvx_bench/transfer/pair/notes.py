"""Requests and answers as notifications between two agents, which carry 64 KiB at most each.

So a target on another host needs no port but the agent's own, and is asked by nobody who has not
got the key.
"""

from __future__ import annotations

import json
import struct
import time
from typing import TYPE_CHECKING, Any

from kvx.errors import UnavailableError

if TYPE_CHECKING:
    from collections.abc import Iterator

    import kvx

_HEADER = struct.Struct("<QII")  # number of the message, of the part, parts
_PART_BYTES = 48 << 10
_PARTS_MAX = 1024
_PATIENCE_S = 60.0


def split(number: int, message: dict[str, Any]) -> Iterator[bytes]:
    """Yield the notifications that carry a message."""
    data = json.dumps(message).encode()
    starts = range(0, len(data), _PART_BYTES)
    for part, start in enumerate(starts):
        yield _HEADER.pack(number, part, len(starts)) + data[start : start + _PART_BYTES]


class Assembler:
    """Puts the messages of one peer together again."""

    def __init__(self) -> None:
        self._number = -1
        self._parts: dict[int, bytes] = {}

    def take(self, payload: bytes) -> tuple[int, dict[str, Any]] | None:
        """Return (number, message) when this was the part that was missing.

        A part of a later message ends the wait for an earlier one.
        """
        if len(payload) < _HEADER.size:
            return None
        number, part, count = _HEADER.unpack_from(payload)
        if not part < count <= _PARTS_MAX:
            return None
        if number != self._number:
            self._number, self._parts = number, {}
        self._parts[part] = payload[_HEADER.size :]
        if len(self._parts) < count:
            return None
        data = b"".join(self._parts[place] for place in range(count))
        self._parts = {}
        message: dict[str, Any] = json.loads(data)
        return number, message


class NoteDesk:
    """Asks the target behind a peer."""

    def __init__(self, agent: kvx.Agent, peer: kvx.Peer) -> None:
        self._agent = agent
        self._peer = peer
        self._number = 0
        self._assembler = Assembler()

    def ask(self, **request: object) -> dict[str, Any]:
        """Send a request and wait for its answer.

        Raises:
            UnavailableError: None came in time, or it says what went wrong.
            PeerLost: The peer is gone.
        """
        self._number += 1
        for part in split(self._number, request):
            self._agent.notify(self._peer, part)
        end = time.monotonic() + _PATIENCE_S
        while time.monotonic() < end:
            for note in self._agent.notifications(1.0):
                found = self._assembler.take(note.payload)
                if found is not None and found[0] == self._number:
                    return _good(found[1])
            if not self._peer.state.is_connected:
                break
        raise UnavailableError(
            f"{self._peer.name} did not {request.get('do')} within {_PATIENCE_S:g} s (it is "
            f"{self._peer.state.value}); does `kvx bench transfer --listen` still run there?"
        )


def _good(answer: dict[str, Any]) -> dict[str, Any]:
    if "error" in answer:
        raise UnavailableError(str(answer["error"]))
    return answer

"""The side that waits: it owns blocks, leases them, and looks at what was written to them."""

from __future__ import annotations

import base64
import time
from typing import TYPE_CHECKING, Any

import kvx
from kvx.errors import KvxError
from kvx_bench.transfer.pair.notes import Assembler, split
from kvx_bench.transfer.pair.side import Side

if TYPE_CHECKING:
    from collections.abc import Callable

_LEASE_S = 3600.0
# Backends whose initiator writes to the target's memory itself, which a lease has to allow.
_REMOTE_WRITERS = {"nixl"}
_LOOK_EVERY_S = 0.5


class Target(Side):
    """Leases its blocks to the initiator."""

    def __init__(self, agent: kvx.Agent, *, driver: str, bytes_max: int | None = None) -> None:
        super().__init__(agent, driver=driver, bytes_max=bytes_max)
        self._leases: dict[int, kvx.BlockLease] = {}

    def answer(self, request: dict[str, Any]) -> dict[str, Any]:
        """Do one request."""
        match request["do"]:
            case "describe":
                card = base64.b85encode(self.agent.export()).decode()
                return {
                    "version": kvx.__version__, "card": card, "addresses": self.agent.addresses,
                }  # fmt: skip
            case "lease":
                return self._lease(request)
            case "release":
                self._leases.pop(request["lease"]).revoke()
                return {}
            case "map":
                # Whoever leased the old memory has gone, maybe without a word.
                self._leases.clear()
        return super().answer(request)

    def serve(self, report: Callable[[str], None]) -> None:
        """Answer what peers ask by notifications, until interrupted.

        Args:
            report: Told of what is worth a line to people.
        """
        assemblers: dict[str, Assembler] = {}
        while True:
            for note in self.agent.notifications(_LOOK_EVERY_S):
                found = assemblers.setdefault(note.peer, Assembler()).take(note.payload)
                if found is not None:
                    self._reply(note.peer, *found, report=report)

    def _reply(
        self, name: str, number: int, request: dict[str, Any], *, report: Callable[[str], None]
    ) -> None:
        try:
            answer = self.answer(request)
        except (KvxError, KeyError, TypeError, ValueError) as error:
            answer = {"error": f"{type(error).__name__}: {error}"}
            report(f"{name} asked to {request.get('do')}: {error}")
        else:
            if request["do"] == "map":
                report(f"{name} measures with {request['num_bytes']} bytes")
        try:
            for part in split(number, answer):
                self.agent.notify(self.agent.peers[name], part)
        except KvxError as error:
            report(f"{name} cannot be answered: {error}")

    def _lease(self, request: dict[str, Any]) -> dict[str, Any]:
        """Lease the first blocks; computing their checksums is in the time that is told."""
        blocks = self.blocks(request)
        rights = kvx.Rights.WRITE if request["is_write"] else kvx.Rights.READ
        if request["is_write"] and request["backend"] in _REMOTE_WRITERS:
            rights |= kvx.Rights.REMOTE_WRITE
        began = time.perf_counter()
        lease = self.registration.lease(
            blocks,
            rights=rights,
            ttl_s=_LEASE_S,
            checksums="compute" if request["has_checksums"] else None,
        )
        wall_s = time.perf_counter() - began
        self._leases[lease.id] = lease
        token = base64.b85encode(lease.token).decode()
        return {"lease": lease.id, "token": token, "wall_s": wall_s}

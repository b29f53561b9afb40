# ruff: noqa: ARG002, N802, PLR0917 - the names and arguments are those of NIXL
"""The bindings of NIXL as far as kvx calls them, moving bytes within this process when told to.

`Fabric` is the network: it holds requests back, fails them, and checks what a user of NIXL must
never do: release a request under way, or touch a peer that was forgotten.
"""

from __future__ import annotations

import ctypes
import itertools
import json
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np


class NixlError(Exception):
    pass


class RemoteDisconnectError(NixlError):
    pass


class NotFoundError(NixlError):
    pass


class Fabric:
    """All agents of a test, and what happens to their requests."""

    def __init__(self) -> None:
        self.agents: dict[str, FakeAgent] = {}
        self.is_held = False  # requests that are posted stay under way
        self.fails_with: type[Exception] | None = None
        self.violations: list[str] = []
        self.counts: dict[str, int] = {}
        self.held: list[Request] = []
        self.after_move: Callable[[Request], None] = lambda _: None

    def release(self) -> None:
        """Let the bytes of all that is held arrive."""
        self.is_held = False
        for request in self.held:
            request.move()
        self.held.clear()

    def count(self, what: str) -> None:
        self.counts[what] = self.counts.get(what, 0) + 1

    def bindings(self) -> Any:
        return SimpleNamespace(
            nixlAgentConfig=SimpleNamespace,
            nixlAgent=lambda name, config: FakeAgent(self, name, config),
            nixlRegDList=lambda kind, items: (kind, items),
            nixlXferDList=lambda kind, rows: (kind, rows.copy()),
            NIXL_THREAD_SYNC_STRICT="strict",
            NIXL_INIT_AGENT="",
            NIXL_SUCCESS=0,
            NIXL_IN_PROG=1,
            NIXL_READ="read",
            NIXL_WRITE="write",
            DRAM_SEG="dram",
            VRAM_SEG="vram",
            nixlRemoteDisconnectError=RemoteDisconnectError,
            nixlNotFoundError=NotFoundError,
            nixlBackendError=NixlError,
        )


class Request:
    def __init__(self, fabric: Fabric, operation: str, pairs: list[tuple[int, int, int]]) -> None:
        self.fabric, self.operation, self.pairs = fabric, operation, pairs
        self.status: int | Exception = -1

    def move(self) -> None:
        for ours, theirs, size in self.pairs:
            target, source = (ours, theirs) if self.operation == "read" else (theirs, ours)
            ctypes.memmove(target, source, size)
        self.fabric.after_move(self)
        self.status = 0


class FakeAgent:
    """`nixlAgent`."""

    def __init__(self, fabric: Fabric, name: str, config: Any) -> None:
        self.fabric, self.name, self.config = fabric, name, config
        self.peers: set[str] = set()
        self.registered: list[Any] = []
        self.things: dict[int, Any] = {}
        self.notices: dict[str, list[bytes]] = {}
        self._numbers = itertools.count(1)
        fabric.agents[name] = self

    def _new(self, thing: Any) -> int:
        number = next(self._numbers)
        self.things[number] = thing
        return number

    def createBackend(self, plugin: str, parameters: dict[str, str]) -> str:
        if plugin == "BROKEN":
            raise NixlError("no such device")
        return plugin

    def getPluginParams(self, plugin: str) -> tuple[dict[str, str], list[str]]:
        return {}, [] if plugin == "EMPTY" else ["DRAM_SEG"]

    def registerMem(self, entry: Any, plugins: list[str]) -> None:
        if entry[0] == "vram":
            raise NixlError("no device")
        self.registered.append(entry)

    def deregisterMem(self, entry: Any, plugins: list[str]) -> None:
        self.registered.remove(entry)

    def getLocalMD(self) -> bytes:
        return json.dumps([self.name, len(self.registered)]).encode()

    def loadRemoteMD(self, metadata: bytes) -> bytes:
        name = json.loads(metadata)[0]
        self.peers.add(name)
        return str(name).encode()

    def makeConnection(self, peer: str, plugins: list[str]) -> None:
        self.fabric.count("connect")

    def invalidateRemoteMD(self, peer: str) -> None:
        if any(isinstance(one, Request) and one.status == 1 for one in self.things.values()):
            self.fabric.violations.append(f"{peer} was forgotten while requests are under way")
        if peer not in self.peers:
            raise NotFoundError(peer)
        self.peers.remove(peer)

    def genNotif(self, peer: str, data: bytes, plugins: list[str]) -> None:
        if peer not in self.peers:
            raise NotFoundError(peer)
        self.fabric.agents[peer].notices.setdefault(self.name, []).append(data)

    def getNotifs(self, told: dict[str, list[bytes]], plugins: list[str]) -> dict[str, list[bytes]]:
        heard, self.notices = self.notices, {}
        return told | heard

    def prepXferDlist(self, side: str, listed: Any, plugins: list[str]) -> int:
        if side and side not in self.peers:
            raise NotFoundError(side)
        self.fabric.count("prepare")
        return self._new(listed[1])

    def releasedDlistH(self, number: int) -> None:
        del self.things[number]

    def makeXferReq(
        self,
        operation: str,
        local: int,
        local_indices: np.ndarray,
        remote: int,
        remote_indices: np.ndarray,
        note: str,
        plugins: list[str],
    ) -> int:
        ours, theirs = self.things[local][local_indices], self.things[remote][remote_indices]
        assert (ours[:, 1] == theirs[:, 1]).all()
        self.fabric.count("request")
        pairs = [(int(a[0]), int(b[0]), int(a[1])) for a, b in zip(ours, theirs, strict=True)]
        return self._new(Request(self.fabric, operation, pairs))

    def postXferReq(self, number: int, note: str) -> int:
        request = self.things[number]
        if request.status == 1:
            self.fabric.violations.append("a request under way was posted again")
        self.fabric.count("post")
        if self.fabric.is_held:
            request.status = 1
            self.fabric.held.append(request)
            return 1
        request.move()
        return 0

    def getXferStatus(self, number: int) -> int:
        if self.fabric.fails_with is not None:
            self.things[number].status = 2
            raise self.fabric.fails_with("it went wrong")
        return int(self.things[number].status)

    def releaseXferReq(self, number: int) -> None:
        if self.things[number].status == 1:
            self.fabric.violations.append("a request under way was released")
        del self.things[number]

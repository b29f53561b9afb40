"""NIXL as kvx uses it: its compiled bindings behind twenty methods with types.

The bindings and not the Python wrapper around them: the wrapper fixes the delay of the progress
thread to zero, which makes it spin, turns all failures into "ERR", and imports pickle. Nothing here
is serialised but by NIXL's own metadata format.
"""

from __future__ import annotations

import enum
import importlib
import logging
import threading
from typing import TYPE_CHECKING, Any

from kvx.buffers import MemoryKind
from kvx.errors import UnavailableError
from kvx.transfer.backends.nixl import probe

if TYPE_CHECKING:
    from types import ModuleType

    import numpy as np
    import numpy.typing as npt

    from kvx.transfer.backends.nixl.options import NixlOptions

_log = logging.getLogger(__name__)
_MICROSECONDS = 1e6


class Progress(enum.Enum):
    """Where NIXL says a request stands.

    UNKNOWN is no end: a request whose peer was forgotten meanwhile is no longer known, and NIXL
    goes on writing into its target (seen: all 64 of 64 MiB).
    """

    RUNNING = enum.auto()
    DONE = enum.auto()
    LOST = enum.auto()
    FAILED = enum.auto()
    UNKNOWN = enum.auto()

    @property
    def is_end(self) -> bool:
        """Whether NIXL is through with the memory of the request."""
        return self in {Progress.DONE, Progress.LOST, Progress.FAILED}


def load() -> ModuleType:
    """Return the bindings of the installed build.

    Raises:
        UnavailableError: There is none, or it cannot be imported.
    """
    name = probe.module_name()
    if not name:
        raise UnavailableError(f"NIXL is not installed: {probe.INSTALL}")
    try:
        return importlib.import_module(f"{name}._bindings")
    except ImportError as error:
        raise UnavailableError(f"{name} cannot be imported: {error}") from error


class NixlAgent:
    """An agent of NIXL. Thread-safe; numbers it returns mean something to itself only."""

    def __init__(self, name: str, options: NixlOptions, bindings: ModuleType) -> None:
        """Start it with the plugins in `options`.

        Raises:
            UnavailableError: A plugin does not start.
        """
        self._bindings = bindings
        self._errors = tuple(
            kind
            for kind in vars(bindings).values()
            if isinstance(kind, type) and issubclass(kind, Exception)
        )
        config = bindings.nixlAgentConfig()
        config.useProgThread = True
        config.useListenThread = False
        config.syncMode = bindings.NIXL_THREAD_SYNC_STRICT
        config.pthrDelay = round(options.progress_every_s * _MICROSECONDS)
        try:
            self._agent: Any = bindings.nixlAgent(name, config)
            self._plugins = [
                self._agent.createBackend(plugin, dict(options.parameters.get(plugin, {})))
                for plugin in options.backends
            ]
        except self._errors as error:
            raise UnavailableError(f"NIXL does not start {options.backends}: {error}") from error
        self._lock = threading.Lock()
        self._registered: dict[int, object] = {}
        self._next = 1

    def register(self, address: int, size_bytes: int, kind: MemoryKind, ordinal: int) -> int:
        """Let NIXL and, with the metadata, peers move this memory.

        Raises:
            UnavailableError: No plugin takes it.
        """
        item = (address, size_bytes, max(ordinal, 0), "")
        try:
            entry = self._bindings.nixlRegDList(self._segment(kind), [item])
            self._agent.registerMem(entry, self._plugins)
        except self._errors as error:
            raise UnavailableError(
                f"NIXL cannot register {size_bytes} bytes of {kind} memory: {error}"
            ) from error
        with self._lock:
            number, self._next = self._next, self._next + 1
            self._registered[number] = entry
        return number

    def deregister(self, number: int) -> None:
        """Take memory back."""
        with self._lock:
            entry = self._registered.pop(number)
        self._agent.deregisterMem(entry, self._plugins)

    def metadata(self) -> bytes:
        """Return what peers need to reach all registered memory."""
        return bytes(self._agent.getLocalMD())

    def load_peer(self, metadata: bytes) -> str:
        """Learn, or learn anew, of a peer; returns its name. Requests under way go on.

        Raises:
            UnavailableError: NIXL refuses it.
        """
        try:
            name = self._agent.loadRemoteMD(metadata)
        except self._errors as error:
            raise UnavailableError(f"NIXL refuses what a peer says of itself: {error}") from error
        return name.decode() if isinstance(name, bytes) else str(name)

    def connect(self, peer: str) -> None:
        """Open the connections to a peer ahead of the first transfer.

        Raises:
            UnavailableError: It cannot be reached.
        """
        try:
            self._agent.makeConnection(peer, self._plugins)
        except self._errors as error:
            raise UnavailableError(f"NIXL does not reach {peer}: {error}") from error

    def forget_peer(self, peer: str) -> None:
        """Disconnect. REQUIRES: no request to it is under way; NIXL would lose track of it."""
        try:
            self._agent.invalidateRemoteMD(peer)
        except self._bindings.nixlNotFoundError:
            return  # NIXL forgets by itself those who were killed

    def notify(self, peer: str, data: bytes) -> None:
        """Tell a peer something over NIXL's connection to it, if that stands."""
        try:
            self._agent.genNotif(peer, data, self._plugins)
        except self._errors as error:
            _log.debug("%s is not there to be told: %s", peer, error)

    def notices(self) -> list[tuple[str, bytes]]:
        """Take what peers have told in that way: (peer, data), in order for each peer."""
        try:
            heard = self._agent.getNotifs({}, self._plugins)
        except self._errors as error:
            _log.warning("NIXL does not say what peers have told: %s", error)
            return []
        return [(peer, data) for peer, told in heard.items() for data in told]

    def prepare(self, peer: str, rows: npt.NDArray[np.uint64], kind: MemoryKind) -> int:
        """Check a list of (address, bytes, ordinal); `peer` is empty for our own memory.

        Raises:
            UnavailableError: Some of it is not registered.
        """
        try:
            listed = self._bindings.nixlXferDList(self._segment(kind), rows)
            side = peer or self._bindings.NIXL_INIT_AGENT
            return int(self._agent.prepXferDlist(side, listed, self._plugins))
        except self._errors as error:
            whose = peer or "ours"
            raise UnavailableError(f"NIXL does not know the memory ({whose}): {error}") from error

    def release_prepared(self, prepared: int) -> None:
        """Let a list go."""
        self._agent.releasedDlistH(prepared)

    def request(
        self, local: int, remote: int, indices: npt.NDArray[np.int32], *, is_write: bool
    ) -> int:
        """Make a request of the rows `indices` of two lists; it can be posted again and again.

        Raises:
            UnavailableError: NIXL refuses it.
        """
        operation = self._bindings.NIXL_WRITE if is_write else self._bindings.NIXL_READ
        try:
            return int(
                self._agent.makeXferReq(
                    operation, local, indices, remote, indices, "", self._plugins
                )
            )
        except self._errors as error:
            raise UnavailableError(f"NIXL refuses the transfer: {error}") from error

    def post(self, request: int) -> Progress:
        """Start a request. Over shared memory its bytes have moved when this returns."""
        return self._progress(lambda: self._agent.postXferReq(request, ""))

    def poll(self, request: int) -> Progress:
        """Return where a posted request stands."""
        return self._progress(lambda: self._agent.getXferStatus(request))

    def release_request(self, request: int) -> None:
        """Let a request go. REQUIRES: it has ended; NIXL would write into its memory later on."""
        self._agent.releaseXferReq(request)

    def stop(self) -> None:
        """End NIXL's thread and connections. REQUIRES: nothing is registered or under way."""
        assert not self._registered, "memory is deregistered first"
        self._agent = None

    def _progress(self, call: Any) -> Progress:
        try:
            status = call()
        except self._bindings.nixlRemoteDisconnectError:
            return Progress.LOST
        except self._bindings.nixlNotFoundError:
            return Progress.UNKNOWN
        except self._errors:
            return Progress.FAILED
        if status == self._bindings.NIXL_SUCCESS:
            return Progress.DONE
        return Progress.RUNNING if status == self._bindings.NIXL_IN_PROG else Progress.FAILED

    def _segment(self, kind: MemoryKind) -> Any:
        is_host = kind is MemoryKind.HOST
        return self._bindings.DRAM_SEG if is_host else self._bindings.VRAM_SEG

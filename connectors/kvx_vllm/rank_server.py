"""Lets the scheduler of an engine ask the cache of a rank that lives in another process."""

from __future__ import annotations

import hashlib
import logging
import os
import selectors
import socket
import threading
from typing import TYPE_CHECKING, Protocol

import numpy as np

import kvx
from kvx_vllm.rank_link import Begin, Link, Locate, Located, Message

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

_log = logging.getLogger(__name__)
_DIRECTORY = "vllm"
_LINKS_MAX = 8
_STOP_S = 2.0


class Locator(Protocol):
    """What is asked: a `kvx_vllm.rank_cache.RankCache`."""

    def begin_life(self, life: int) -> bool:
        """Reset for a life that is newer; False where a newer one has begun."""

    def locate(self, group: int, hashes: Sequence[bytes], first: int) -> kvx.Location:
        """Return where blocks are."""


def socket_path(engine_id: str, rank: int) -> Path:
    """Return where a rank of an engine listens; both ends work it out.

    Raises:
        kvx.UnavailableError: The directory of sockets is not this user's alone.
    """
    name = hashlib.blake2b(f"{engine_id}/{rank}".encode(), digest_size=8).hexdigest()
    return kvx.socket_directory(_DIRECTORY) / f"{name}.sock"


class RankServer:
    """A socket and the thread that answers on it; both are gone when it is closed."""

    def __init__(self, path: Path, locator: Locator) -> None:
        """Listen.

        Raises:
            kvx.ConfigError: Another rank listens there: two engines have one id.
        """
        self.path = path
        self._locator = locator
        self._links: set[Link] = set()
        self._selector = selectors.DefaultSelector()
        self._listener = _listen(path)
        self._wake, self._woken = socket.socketpair()
        self._selector.register(self._listener, selectors.EVENT_READ)
        self._selector.register(self._woken, selectors.EVENT_READ)
        self._thread = threading.Thread(target=self._run, name="kvx-rank-server", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stop answering and remove the socket file."""
        self.path.unlink(missing_ok=True)
        self._wake.close()
        self._thread.join(_STOP_S)

    def _run(self) -> None:
        is_open = True
        while is_open:
            for key, _ in self._selector.select():
                if key.fileobj is self._woken:
                    is_open = False
                elif key.fileobj is self._listener:
                    self._accept()
                else:
                    self._serve(key.fileobj)  # type: ignore[arg-type]
        for link in list(self._links):
            self._drop(link)
        self._selector.close()
        self._listener.close()
        self._woken.close()

    def _accept(self) -> None:
        try:
            connected, _ = self._listener.accept()
            link = Link(connected)
        except OSError as error:
            _log.warning("%s: refused a connection: %s", self.path, error)
            return
        if len(self._links) >= _LINKS_MAX:
            _log.warning("%s: refused a connection: there are %d", self.path, _LINKS_MAX)
            link.close()
            return
        self._links.add(link)
        self._selector.register(link, selectors.EVENT_READ)

    def _serve(self, link: Link) -> None:
        """Answer what has come; what the other end does not take is sent when it does."""
        try:
            link.flush()
            for message in link.receive():
                answer = self._answer(message)
                if answer is not None:
                    link.send(answer)
        except ConnectionError as error:
            _log.debug("%s: a connection ended: %s", self.path, error)
            self._drop(link)
        except OSError as error:
            _log.warning("%s: a connection is closed: %s", self.path, error)
            self._drop(link)
        else:
            writes = selectors.EVENT_WRITE if link.unsent_bytes else 0
            self._selector.modify(link, selectors.EVENT_READ | writes)

    def _answer(self, message: Message) -> Located | None:
        if isinstance(message, Begin):
            self._begin(message)
            return None
        if not isinstance(message, Locate) or not 0 <= message.first <= len(message.hashes):
            raise OSError(f"{type(message).__name__} is no question that can be answered")
        location = self._locate(message)
        return Located(message.number, location.tiers.tobytes(), location.reason, location.is_final)

    def _begin(self, message: Begin) -> None:
        try:
            self._locator.begin_life(message.life)
        except kvx.KvxError as error:
            _log.warning("the cache cannot be reset: %s", error)

    def _locate(self, question: Locate) -> kvx.Location:
        """Return where blocks are; nowhere, if that cannot be said."""
        try:
            if self._locator.begin_life(question.life):
                return self._locator.locate(question.group, question.hashes, question.first)
            reason = kvx.MissReason.STALE
        except (kvx.KvxError, IndexError) as error:
            _log.warning("a question of the scheduler cannot be answered: %s", error)
            reason = kvx.MissReason.TIER_DOWN
        none = np.zeros(len(question.hashes) - question.first, np.uint8)
        return kvx.Location(none, reason)

    def _drop(self, link: Link) -> None:
        self._links.discard(link)
        self._selector.unregister(link)
        link.close()


def _listen(path: Path) -> socket.socket:
    """Listen on a path that nobody listens on; it appears when it can be connected to."""
    if _is_served(path):
        raise kvx.ConfigError(
            f"{path}: a rank of another engine listens there, which has the same engine_id: "
            'give each engine its own "engine_id" in --kv-transfer-config, or leave it out'
        )
    hidden = path.with_name(f".{path.name}.{os.getpid()}")
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
    try:
        listener.bind(str(hidden))
        listener.listen(_LINKS_MAX)
        hidden.rename(path)
    except BaseException:
        listener.close()
        hidden.unlink(missing_ok=True)
        raise
    return listener


def _is_served(path: Path) -> bool:
    try:
        Link.to(path).close()
    except OSError:
        return False
    return True

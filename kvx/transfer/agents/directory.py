"""A shared directory in which agents leave their cards: one file each, replaced as a whole."""

from __future__ import annotations

import contextlib
import logging
import os
import re
import stat
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from kvx.errors import KvxError, StorageError
from kvx.transfer.agents.identity import NAME
from kvx.transfer.agents.metadata import CARD_BYTES_MAX, AgentCard, decode_card

if TYPE_CHECKING:
    from kvx.transfer.agents.key import SharedKey

_log = logging.getLogger(__name__)
_SUFFIX = ".card"
_FILE = re.compile(NAME + re.escape(_SUFFIX))


class CardDirectory:
    """The cards in one directory. Not thread-safe."""

    def __init__(self, path: Path, key: SharedKey | None, *, forget_after_s: float) -> None:
        """Use a directory; it is made, for this user alone, when it is not there.

        Raises:
            StorageError: It cannot be made.
        """
        self._path = path
        self._key = key
        self._forget_after_s = forget_after_s
        self._seen: dict[str, tuple[int, int]] = {}
        try:
            path.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError as error:
            raise StorageError(
                f"{path}: the directory of cards cannot be made: {error.strerror}",
                errno=error.errno,
                key=str(path),
            ) from error

    def publish(self, name: str, data: bytes) -> None:
        """Write our own card; readers see the old one or the new one.

        Raises:
            StorageError: It cannot be written.
        """
        try:
            fd, temporary = tempfile.mkstemp(prefix=".new-", dir=self._path)  # made 0600
            try:
                with os.fdopen(fd, "wb") as file:
                    file.write(data)
                Path(temporary).replace(self._path / (name + _SUFFIX))
            except BaseException:
                Path(temporary).unlink(missing_ok=True)
                raise
        except OSError as error:
            raise StorageError(
                f"{self._path}: the card of {name} cannot be written: {error.strerror}",
                errno=error.errno,
                key=name,
            ) from error

    def withdraw(self, name: str, incarnation: int) -> None:
        """Remove our own card, unless a later life has put its own there."""
        path = self._path / (name + _SUFFIX)
        data = self._read(path)
        card = None if data is None else self._decoded(path, data)
        if card is not None and card.identity.incarnation == incarnation:
            self._remove(path)

    def scan(self, now_ns: int, limit: int) -> list[tuple[AgentCard, bytes]]:
        """Return the cards that are new since the last scan; dead and outdated ones are removed."""
        found = []
        for path in self._files(limit):
            stamp = self._stamp(path)
            if stamp is None or self._seen.get(path.name) == stamp:
                continue
            data = self._read(path)
            card = None if data is None else self._decoded(path, data)
            if card is not None and data is not None and not self._is_over(path, card, now_ns):
                found.append((card, data))
            self._seen[path.name] = stamp
        return found

    def _files(self, limit: int) -> list[Path]:
        try:
            names = sorted(os.listdir(self._path))  # noqa: PTH208 - names are all that is needed
        except OSError as error:
            _log.warning("%s: cards cannot be listed: %s", self._path, error.strerror)
            return []
        names = [name for name in names if _FILE.fullmatch(name)]
        self._seen = {name: self._seen[name] for name in names if name in self._seen}
        return [self._path / name for name in names[:limit]]

    def _is_over(self, path: Path, card: AgentCard, now_ns: int) -> bool:
        is_over = card.host.is_dead() or card.age_s(now_ns) > self._forget_after_s
        if is_over:
            self._remove(path)
        return is_over

    def _decoded(self, path: Path, data: bytes) -> AgentCard | None:
        try:
            card = decode_card(data, self._key)
        except KvxError as error:
            _log.warning("%s is passed over: %s", path, error)
            return None
        if path.name != card.name + _SUFFIX:
            _log.warning("%s is passed over: it is the card of %s", path, card.name)
            return None
        return card

    @staticmethod
    def _stamp(path: Path) -> tuple[int, int] | None:
        try:
            found = path.lstat()
        except FileNotFoundError:
            return None
        return found.st_mtime_ns, found.st_ino

    @staticmethod
    def _read(path: Path) -> bytes | None:
        """Return a card's bytes; None for what is no plain file of a card's size."""
        try:
            fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        except OSError as error:
            _log.debug("%s cannot be opened: %s", path, error.strerror)
            return None
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            os.close(fd)
            return None
        with os.fdopen(fd, "rb") as file:
            data = file.read(CARD_BYTES_MAX + 1)
        return data if len(data) <= CARD_BYTES_MAX else None

    @staticmethod
    def _remove(path: Path) -> None:
        with contextlib.suppress(FileNotFoundError, PermissionError):
            path.unlink()

"""Finds device memory of peers: asks whether it may be copied from, and maps it once.

Asking is a message to the owner and one back. Whoever has asked under a lease, and has the memory
mapped, need not ask again: the lease's word in the shared page tells the rest.
"""

from __future__ import annotations

import itertools
import logging
import os
import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING

from kvx.errors import IncompatibleError, KvxError, UnavailableError
from kvx.transfer.backends.cuda_ipc.imports import Import, Imports, Place
from kvx.transfer.backends.device import messages
from kvx.transfer.backends.device.job import code_of
from kvx.transfer.backends.fields import numbers_of
from kvx.transfer.codes import Code

if TYPE_CHECKING:
    from collections.abc import Callable

    from kvx.transfer.backends.cuda_ipc.door import Doors
    from kvx.transfer.backends.device.desk import Desk, Desks
    from kvx.transfer.core import LeaseRef

    Found = Callable[[Import | None, Code, str], None]

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Want:
    """Memory that is looked for.

    Attributes:
        place: What, and for which device of ours.
        lease: Of the peer, under which it is to be copied from.
        must_ask: Whether the owner has not been asked about this lease yet.
    """

    place: Place
    lease: LeaseRef
    must_ask: bool


class Sources:
    """The finder of one endpoint. `found` is called on the endpoint's clerk."""

    def __init__(
        self, desks: Desks, imports: Imports, doors: Doors,
        send: Callable[[str, messages.Message], None],
    ) -> None:  # fmt: skip
        """Know how to ask and where to keep what was found."""
        self._desks = desks
        self._imports = imports
        self._doors = doors
        self._send = send
        self._numbers = itertools.count(1)
        self._lock = threading.Lock()
        self._asked: dict[int, tuple[Want, Found]] = {}

    def find(self, want: Want, found: Found) -> int:
        """Find memory; returns the number of the question, 0 when none was needed."""
        known = self._imports.take(want.place)
        if known is not None and not want.must_ask:
            found(known, Code.OK, "")
            return 0
        if known is not None:
            self._imports.release(known)
        number = next(self._numbers)
        with self._lock:
            self._asked[number] = (want, found)
        door = self._doors.to(want.place.peer, want.place.life)
        try:
            self._send(
                want.place.peer,
                messages.Open(
                    number, numbers_of(want.lease), want.place.region, door.name, known is None
                ),
            )
        except KvxError as error:
            self._end(number, code_of(error), str(error))
        return number

    def answered(self, peer: str, word: messages.Opened) -> None:
        """Take an answer; for the clerk."""
        with self._lock:
            asked = self._asked.get(word.number)
            if asked is None or asked[0].place.peer != peer:
                return
            del self._asked[word.number]
        want, found = asked
        if word.code != Code.OK:
            found(None, Code(word.code) if word.code in set(Code) else Code.USAGE, word.text)
            return
        try:
            taken = self._imports.take(want.place)
            if taken is None:
                if word.handle is None:
                    raise IncompatibleError(f"{peer} did not say where its memory is")
                taken = self._imports.add(self._opened(want.place, word.handle))
        except KvxError as error:
            found(None, code_of(error), str(error))
            return
        found(taken, Code.OK, "")

    def forget(self, number: int) -> None:
        """Take no answer to a question any more."""
        with self._lock:
            self._asked.pop(number, None)

    def lose(self, peer: str, life: int) -> None:
        """End what was asked of a life of a peer that is gone."""
        with self._lock:
            lost = [
                number
                for number, (want, _) in self._asked.items()
                if (want.place.peer, want.place.life) == (peer, life)
            ]
        for number in lost:
            self._end(number, Code.PEER_LOST, f"{peer} is gone")

    def _end(self, number: int, code: Code, text: str) -> None:
        with self._lock:
            asked = self._asked.pop(number, None)
        if asked is not None:
            asked[1](None, code, text)

    def _opened(self, place: Place, handle: messages.Handle) -> Import:
        """Map memory of a peer."""
        if not 0 <= handle.offset <= handle.size_bytes - handle.region_bytes:
            raise IncompatibleError("the peer's region does not lie within its memory")
        desk = self._desk_for(place, handle.device)
        fd = -1
        if handle.token:
            fd = self._doors.to(place.peer, place.life).take(handle.token)
        try:
            memory = desk.device.open_shared(handle.data, fd, handle.size_bytes)
        finally:
            if fd >= 0:
                os.close(fd)
        return Import(place, desk, memory, memory.address + handle.offset, handle.region_bytes)

    def _desk_for(self, place: Place, uuid: str) -> Desk:
        if place.ordinal < 0:
            return self._desks.of(uuid)
        desk = self._desks.at(place.ordinal)
        if desk.uuid != uuid:
            objection = desk.device.can_reach(self._desks.ordinal_of(uuid))
            if objection:
                raise UnavailableError(f"{objection}: read it into host memory")
        return desk

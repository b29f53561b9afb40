"""The agents of this process, so that two of them are joined without a socket.

The table is the one thing here that belongs to the process: agents that know nothing of each other
have to meet somewhere. It keeps none of them alive.
"""

from __future__ import annotations

import os
import weakref
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from kvx.transfer.core import LinkCore


class Door:
    """Where an agent of this process can be reached; gone with its agent."""

    def __init__(self, core: LinkCore) -> None:
        """Lead to a core."""
        self.core = core


_doors: weakref.WeakValueDictionary[tuple[int, int], Door] = weakref.WeakValueDictionary()


def open_door(incarnation: int, core: LinkCore) -> Door:
    """Let other agents of this process find this one, for as long as the door is kept."""
    door = Door(core)
    _doors[os.getpid(), incarnation] = door
    return door


def find_door(incarnation: int) -> Door | None:
    """Return the door of an agent of this process; None when it is not here."""
    return _doors.get((os.getpid(), incarnation))

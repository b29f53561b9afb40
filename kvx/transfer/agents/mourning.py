"""Peers that were lost: backends are told at once, and again when one is known to be dead.

Whether a process has ended can be told on this host only. Of a peer elsewhere nobody learns more
than that it cannot be reached.
"""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

    from kvx.transfer.agents.roster import PeerRecord


class Mourning:
    """Tells who asked of lost peers, on the agent's thread.

    Attributes:
        takers: Called with (name, incarnation, whether that life has ended).
    """

    def __init__(self) -> None:
        """Miss nobody."""
        self.takers: list[Callable[[str, int, bool], None]] = []
        self._lock = threading.Lock()
        self._missed: dict[tuple[str, int], PeerRecord] = {}

    def lost(self, record: PeerRecord) -> None:
        """Tell that a peer cannot be reached, and watch whether it is dead."""
        has_ended = _has_ended(record)
        if not has_ended:
            with self._lock:
                self._missed[record.name, record.identity.incarnation] = record
        self._tell(record, has_ended=has_ended)

    def tick(self) -> None:
        """Tell of those that were lost and have died since; forget those that came back."""
        with self._lock:
            for key, record in list(self._missed.items()):
                if record.lanes:
                    del self._missed[key]
            dead = [record for record in self._missed.values() if _has_ended(record)]
            for record in dead:
                del self._missed[record.name, record.identity.incarnation]
        for record in dead:
            self._tell(record, has_ended=True)

    def _tell(self, record: PeerRecord, *, has_ended: bool) -> None:
        for taker in self.takers:
            taker(record.name, record.identity.incarnation, has_ended)


def _has_ended(record: PeerRecord) -> bool:
    return record.card is not None and record.card.host.is_dead()

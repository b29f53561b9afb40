"""The one thread of an agent: reads the events of the native core and hands them on."""

from __future__ import annotations

import logging
import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING

from kvx.errors import KvxError
from kvx.transfer.core import Event, EventKind

if TYPE_CHECKING:
    from collections.abc import Callable

    from kvx.transfer.agents.conversation import Conversation
    from kvx.transfer.agents.dialler import Dialler
    from kvx.transfer.agents.discovery import Discovery
    from kvx.transfer.agents.instruments import AgentInstruments
    from kvx.transfer.agents.mailbox import Mailbox
    from kvx.transfer.agents.membership import Membership
    from kvx.transfer.agents.peer_state import PeerEvent
    from kvx.transfer.agents.roster import Roster
    from kvx.transfer.agents.transfers import TransferDesk
    from kvx.transfer.core import LinkCore

_log = logging.getLogger(__name__)
_EVENTS_MAX = 256
_JOIN_S = 5.0


@dataclass(frozen=True, slots=True)
class Notification:
    """Bytes that a peer sent, by itself or with the end of a write.

    Attributes:
        peer: Name of the sender.
        payload: What it sent.
    """

    peer: str
    payload: bytes


class Loop:
    """Runs on a daemon thread until `stop`; knows the parts of the agent, not the agent.

    Attributes:
        callbacks: Called with every peer event, on this thread.
        word_takers: Who takes the messages of a backend, by its name: called with (peer, bytes).
        chores: Called once, on this thread, outside all locks.
        tickers: Called with every tick, likewise.
    """

    def __init__(
        self,
        core: LinkCore,
        name: str,
        *,
        tick_s: float,
        roster: Roster,
        membership: Membership,
        conversation: Conversation,
        discovery: Discovery,
        dialler: Dialler,
        desk: TransferDesk,
        instruments: AgentInstruments,
        notes: Mailbox[Notification],
        events: Mailbox[PeerEvent],
        clock: Callable[[], float],
    ) -> None:
        """Make it; `start` begins."""
        self._core = core
        self._tick_s = tick_s
        self._roster = roster
        self._membership = membership
        self._conversation = conversation
        self._discovery = discovery
        self._dialler = dialler
        self._desk = desk
        self._instruments = instruments
        self._notes = notes
        self._events = events
        self._clock = clock
        self._next_tick = clock()
        self._is_stopping = False
        self._thread = threading.Thread(target=self._run, name=f"kvx-agent-{name}", daemon=True)
        self.callbacks: list[Callable[[PeerEvent], None]] = []
        self.word_takers: dict[str, Callable[[str, bytes], None]] = {}
        self.chores: list[Callable[[], None]] = []
        self.tickers: list[Callable[[], None]] = []

    def start(self) -> None:
        """Begin to read events."""
        self._thread.start()

    def stop(self) -> None:
        """End the thread, and wait for it unless this is it."""
        self._is_stopping = True
        self._core.wake()
        if self._thread is not threading.current_thread() and self._thread.ident is not None:
            self._thread.join(_JOIN_S)

    def turn(self, timeout_s: float) -> None:
        """Take what comes within a time, and do what is due; once."""
        for event in self._core.next_events(_EVENTS_MAX, timeout_s):
            try:
                self._take(event)
            except Exception:  # noqa: BLE001 - logged here: it is somebody else's code
                _log.exception("event %s was not taken", EventKind(event[0]).name)
        if self._clock() >= self._next_tick or self._dialler.next_due() <= self._clock():
            self._tick()
        self._deliver()

    def _run(self) -> None:
        while not self._is_stopping:
            due = min(self._next_tick, self._dialler.next_due())
            self.turn(max(0.0, due - self._clock()))

    def _tick(self) -> None:
        self._next_tick = self._clock() + self._tick_s
        try:
            with self._roster.changed:
                self._discovery.tick()
                self._membership.tick()
        except KvxError:
            _log.exception("looking after the peers failed")
        for ticker in self.tickers:
            _logged(ticker)

    def _take(self, event: Event) -> None:
        kind, connection, peer, number, payload = event
        match kind:
            case EventKind.ENDED:
                self._desk.ended("", number)
                return
            case EventKind.QUIET:
                return
            case EventKind.NOTE:
                record = self._roster.by_number(peer)
                if record is not None:
                    self._notes.put(Notification(record.name, payload))
                return
        with self._roster.changed:
            match kind:
                case EventKind.OPENED:
                    self._membership.opened(connection)
                case EventKind.GREETING:
                    self._membership.greeting(connection, payload)
                case EventKind.MESSAGE:
                    self._conversation.heard(connection, payload)
                case EventKind.CLOSED:
                    reason = payload.decode("utf-8", "replace")
                    self._membership.closed(connection, reason)

    def _deliver(self) -> None:
        """Tell what has happened, outside all locks."""
        with self._roster.changed:
            events, self._membership.events = self._membership.events, []
            words, self._conversation.words = self._conversation.words, []
            chores, self.chores = self.chores, []
        for event in events:
            self._instruments.note_event(event)
            for callback in list(self.callbacks):
                _logged(callback, event)
            self._events.put(event)
        for backend, peer, payload in words:
            taker = self.word_takers.get(backend)
            if taker is not None:
                _logged(taker, peer, payload)
        for chore in chores:
            _logged(chore)


def _logged(callback: Callable[..., None], *arguments: object) -> None:
    try:
        callback(*arguments)
    except Exception:  # noqa: BLE001 - logged here: it is somebody else's code
        _log.exception("a callback failed")

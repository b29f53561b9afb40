"""Tells peers which keys this cache holds: all of them once, then what changes, in order.

Changes are the cache's own events, gathered for a moment. What a peer is told goes on from what it
was told last, so whoever takes nothing for a while costs no memory; who lags behind what the event
log remembers starts over. When nobody listens nothing is done.
"""

from __future__ import annotations

import logging
import secrets
import threading
from collections import deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from kvx.cache.events import AllBlocksCleared, BlockStored, EventLog
from kvx.cache.peer.messages import (
    KEY_BYTES,
    KEYS_MAX,
    Change,
    ChangeKind,
    Delta,
    SnapshotPart,
    Subscribe,
    encode,
)
from kvx.cache.peer.replica import TIERS
from kvx.errors import CapacityError, KvxError, StaleReference

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from kvx.cache.events import Event

_log = logging.getLogger(__name__)
_PART_BYTES = KEYS_MAX * KEY_BYTES
_CHANGES_MAX = 1024
_TIER_OF_NAME = {tier.name.lower(): int(tier) for tier in TIERS}
_BUSY_S = 0.2


@dataclass(slots=True, eq=False)
class Subscriber:
    """How far a peer was told.

    Attributes:
        sent: Number of the last change it was told.
        parts: What is left to send of a snapshot.
    """

    sent: int = 0
    parts: deque[SnapshotPart] = field(default_factory=deque)


class Publisher:
    """Keeps peers up to date. Its own methods are thread-safe; sending is up to one thread.

    Attributes:
        log: Names the sequence of changes; another one each time a cache is opened.
    """

    def __init__(
        self,
        events: EventLog,
        say: Callable[[str, bytes], None],
        call_later: Callable[[float, Callable[[], None]], None],
        *,
        publish_s: float,
    ) -> None:
        """Have nobody to tell.

        Args:
            events: Of the cache.
            say: Sends a message to a peer, by name; raises PeerLost, or CapacityError for now.
            call_later: Runs something after some seconds, always on the same thread.
            publish_s: How long changes are gathered.
        """
        self.log = secrets.randbits(62) + 1
        self._events = events
        self._say = say
        self._call_later = call_later
        self._publish_s = publish_s
        self._lock = threading.Lock()
        self._subscribers: dict[str, Subscriber] = {}
        self._end: Callable[[], None] | None = None
        self._is_due = False

    def __len__(self) -> int:
        """Return the number of peers that listen."""
        return len(self._subscribers)

    def subscribe(self, peer: str, wish: Subscribe) -> None:
        """Tell a peer from now on; it may say how far it was told before."""
        is_known = wish.log == self.log and 0 < wish.sequence <= self._events.last_sequence
        subscriber = Subscriber(wish.sequence) if is_known else self._from_the_start()
        with self._lock:
            if self._end is None:
                self._end = self._events.subscribe(self._changed)
            self._subscribers[peer] = subscriber
        self._schedule(0.0)

    def unsubscribe(self, peer: str) -> None:
        """Tell a peer no more; nothing when it was not told."""
        with self._lock:
            self._subscribers.pop(peer, None)
            is_idle, end = not self._subscribers, self._end
            if is_idle:
                self._end = None
        if is_idle and end is not None:
            end()

    def close(self) -> None:
        """Tell nobody any more."""
        for peer in list(self._subscribers):
            self.unsubscribe(peer)

    def _changed(self, _: Event) -> None:
        if not self._is_due:
            self._schedule(self._publish_s)

    def _schedule(self, delay_s: float) -> None:
        self._is_due = True
        self._call_later(delay_s, self._publish)

    def _publish(self) -> None:
        self._is_due = False  # before anything is read: what comes from now on is due again
        deltas: dict[int, list[Delta]] = {}
        for peer, subscriber in list(self._subscribers.items()):
            try:
                self._tell(peer, subscriber, deltas)
            except CapacityError:
                self._schedule(_BUSY_S)
            except KvxError as error:
                # It asks again when it is back.
                _log.debug("%s is told no more: %s", peer, error)
                self.unsubscribe(peer)

    def _tell(self, peer: str, subscriber: Subscriber, deltas: dict[int, list[Delta]]) -> None:
        while subscriber.parts:
            self._say(peer, encode(subscriber.parts[0]))
            subscriber.parts.popleft()
        sent = subscriber.sent
        if sent not in deltas:
            try:
                events = self._events.replay(sent + 1)
            except StaleReference:
                fresh = self._from_the_start()
                subscriber.sent, subscriber.parts = fresh.sent, fresh.parts
                self._schedule(0.0)
                return
            deltas[sent] = list(deltas_of(self.log, sent, events))
        for delta in deltas[sent]:
            self._say(peer, encode(delta))
            subscriber.sent = delta.last

    def _from_the_start(self) -> Subscriber:
        snapshot = self._events.snapshot()
        parts: deque[SnapshotPart] = deque()
        packed = [
            (tier, snapshot.keys[name].tobytes())
            for name, tier in _TIER_OF_NAME.items()
            if name in snapshot.keys
        ]
        cuts = [
            (tier, keys[start : start + _PART_BYTES])
            for tier, keys in packed
            for start in range(0, len(keys), _PART_BYTES)
        ] or [(int(TIERS[0]), b"")]
        for number, (tier, keys) in enumerate(cuts):
            is_last = number == len(cuts) - 1
            parts.append(
                SnapshotPart(self.log, snapshot.sequence, number, is_last, tier, keys)
            )  # fmt: skip
        return Subscriber(snapshot.sequence, parts)


def deltas_of(log: int, sent: int, events: list[Event]) -> Iterator[Delta]:
    """Cut the events behind number `sent` into deltas of limited size; changes in a row merge."""
    first, last, changes, size = sent + 1, sent, list[Change](), 0
    for event in events:
        for change in _changes_of(event):
            if size + len(change.keys) > _PART_BYTES or len(changes) >= _CHANGES_MAX:
                yield Delta(log, first, last, changes)
                first, changes, size = last + 1, [], 0
            before = changes[-1] if changes else None
            is_same = before is not None and (before.kind, before.tier) == (
                change.kind, change.tier,
            )  # fmt: skip
            if before is not None and is_same:
                changes[-1] = Change(change.kind, change.tier, before.keys + change.keys)
            else:
                changes.append(change)
            size += len(change.keys)
        last = event.sequence
    if last >= first:
        yield Delta(log, first, last, changes)


def _changes_of(event: Event) -> Iterator[Change]:
    if isinstance(event, AllBlocksCleared):
        yield Change(int(ChangeKind.CLEARED), 0, b"")
        return
    tier = _TIER_OF_NAME.get(event.tier)
    if tier is None:
        return
    kind = ChangeKind.STORED if isinstance(event, BlockStored) else ChangeKind.REMOVED
    for start in range(0, len(event.keys), _PART_BYTES):
        yield Change(int(kind), tier, event.keys[start : start + _PART_BYTES])

"""What the cache stored and removed, in order: for routers, indexes and tests.

Every event has a sequence number, one higher than the one before. A subscriber that missed some
asks for a replay; when the log does not reach back that far, it starts over from a snapshot. The
cache never waits for a subscriber.
"""

from __future__ import annotations

import collections
import contextlib
import itertools
import logging
import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING

import msgspec

from kvx.errors import StaleReference

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    import numpy as np
    import numpy.typing as npt

    from kvx.cache.reasons import MissReason


_log = logging.getLogger(__name__)


class BlockStored(msgspec.Struct, frozen=True, tag=True, array_like=True):
    """A tier holds these blocks now.

    Attributes:
        sequence: Number of the event.
        tier: Its name.
        namespace: `Namespace.public_id` of all of them, 16 bytes.
        keys: 16 bytes of each block, one after the other.
    """

    sequence: int
    tier: str
    namespace: bytes
    keys: bytes


class BlockRemoved(msgspec.Struct, frozen=True, tag=True, array_like=True):
    """A tier does not hold these blocks any more.

    Attributes:
        sequence: Number of the event.
        tier: Its name.
        reason: Why, as `MissReason` names it.
        keys: 16 bytes of each block, one after the other.
    """

    sequence: int
    tier: str
    reason: str
    keys: bytes


class AllBlocksCleared(msgspec.Struct, frozen=True, tag=True, array_like=True):
    """The cache was emptied.

    Attributes:
        sequence: Number of the event.
    """

    sequence: int


Event = BlockStored | BlockRemoved | AllBlocksCleared

_encoder = msgspec.msgpack.Encoder()
_decoder: msgspec.msgpack.Decoder[Event] = msgspec.msgpack.Decoder(Event)


def encode_event(event: Event) -> bytes:
    """Return an event as MessagePack; see docs/formats/events.md."""
    return _encoder.encode(event)


def decode_event(data: bytes) -> Event:
    """Return the event that `encode_event` wrote.

    Raises:
        msgspec.DecodeError: It is none.
    """
    return _decoder.decode(data)


@dataclass(frozen=True, slots=True)
class Snapshot:
    """What every tier holds at one point of the sequence.

    Attributes:
        sequence: Events up to this one are in it; replay from the next.
        keys: (n, 16) uint8 by tier.
    """

    sequence: int
    keys: dict[str, npt.NDArray[np.uint8]]


class EventLog:
    """The last events, and those who want to hear of new ones. Thread-safe."""

    def __init__(self, capacity: int) -> None:
        """Keep up to `capacity` events for replay."""
        self._lock = threading.Lock()
        self._changing = threading.Lock()
        self._changing_thread = 0
        self._undelivered: list[Event] = []
        self._events: collections.deque[Event] = collections.deque(maxlen=capacity)
        self._next = 1
        self._listeners: list[Callable[[Event], None]] = []
        self._held: Callable[[], dict[str, npt.NDArray[np.uint8]]] = dict

    @property
    def last_sequence(self) -> int:
        """Number of the newest event; 0 before the first."""
        return self._next - 1

    def stored(self, keys: npt.NDArray[np.uint8], tier: str, namespace: bytes) -> None:
        """Publish that a tier holds (n, 16) uint8 keys now."""
        packed = keys.tobytes()
        self._publish(lambda sequence: BlockStored(sequence, tier, namespace, packed))

    def removed(self, keys: npt.NDArray[np.uint8], tier: str, reason: MissReason) -> None:
        """Publish that a tier does not hold (n, 16) uint8 keys any more."""
        packed = keys.tobytes()
        self._publish(lambda sequence: BlockRemoved(sequence, tier, reason.name.lower(), packed))

    def cleared(self) -> None:
        """Publish that the cache was emptied."""
        self._publish(AllBlocksCleared)

    @contextlib.contextmanager
    def changing(self) -> Iterator[None]:
        """Make one step of a change to what is held and its events; for the cache.

        Otherwise a block that one thread commits while another drops it could be announced after
        its removal. Nothing that locks belongs inside; listeners hear of the events afterwards.
        """
        with self._changing:
            self._changing_thread = threading.get_ident()
            try:
                yield
            finally:
                self._changing_thread = 0
                events, self._undelivered = self._undelivered, []
        for event in events:
            self._deliver(event)

    def subscribe(self, listener: Callable[[Event], None]) -> Callable[[], None]:
        """Call `listener` with every new event, on the thread that caused it; it must be quick.

        Events that several threads cause at the same time may come in another order than their
        numbers. What a listener raises is logged.

        Returns:
            A function that ends the subscription.
        """
        with self._lock:
            self._listeners.append(listener)

        def end() -> None:
            with self._lock:
                if listener in self._listeners:
                    self._listeners.remove(listener)

        return end

    def replay(self, from_sequence: int) -> list[Event]:
        """Return the events from a number on, oldest first.

        Raises:
            StaleReference: They are forgotten already, or the number is from the time before a
                restart; take a `snapshot` instead.
        """
        with self._lock:
            oldest = self._next - len(self._events)
            if not oldest <= from_sequence <= self._next:
                raise StaleReference(
                    f"events from {from_sequence} on were asked for, the oldest kept is {oldest} "
                    f"and the next will be {self._next}; take a snapshot and replay from behind it"
                )
            # From the end: who replays mostly wants the last few of very many.
            newest = itertools.islice(reversed(self._events), self._next - from_sequence)
            return list(newest)[::-1]

    def snapshot(self) -> Snapshot:
        """Return what the tiers hold, and the sequence number to replay behind.

        Events that happen meanwhile may be in both: applying one twice does no harm.
        """
        sequence = self.last_sequence
        return Snapshot(sequence, self._held())

    def take_snapshots_from(self, held: Callable[[], dict[str, npt.NDArray[np.uint8]]]) -> None:
        """Set what `snapshot` asks for the keys by tier; for the cache."""
        self._held = held

    def _publish(self, make: Callable[[int], Event]) -> None:
        with self._lock:
            event = make(self._next)
            self._next += 1
            self._events.append(event)
        if self._changing_thread == threading.get_ident():
            self._undelivered.append(event)
        else:
            self._deliver(event)

    def _deliver(self, event: Event) -> None:
        with self._lock:
            listeners = list(self._listeners)
        for listener in listeners:
            try:
                listener(event)
            except Exception:  # noqa: BLE001 - logged here
                # It runs where blocks are settled, and those must not suffer from it.
                _log.exception("a listener failed on event %d", event.sequence)

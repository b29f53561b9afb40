"""What peers are told, and what they make of it: held against sets, with losses and restarts."""

from __future__ import annotations

import random
import time
from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import pytest

from kvx.cache.events import EventLog
from kvx.cache.key_table import KeyTable
from kvx.cache.peer import messages
from kvx.cache.peer.messages import Delta, SnapshotPart, Subscribe
from kvx.cache.peer.publisher import Publisher, deltas_of
from kvx.cache.peer.replica import Replica
from kvx.cache.reasons import MissReason
from kvx.cache.result import TierKind
from kvx.errors import CapacityError, PeerLost, UsageError

DRAM, NVME = TierKind.DRAM, TierKind.NVME
NAMESPACE = b"n" * 16


def keys_of(*numbers: int) -> npt.NDArray[np.uint8]:
    rows = np.zeros((len(numbers), 2), np.uint64)
    rows[:, 0] = numbers
    rows[:, 1] = np.array(numbers, np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    return rows.view(np.uint8).reshape(-1, 16)


class Wire:
    """A cache's event log with a publisher, and what its messages come to on the other side."""

    def __init__(self, capacity: int = 1000) -> None:
        self.events = EventLog(capacity)
        self.held: dict[TierKind, set[int]] = {DRAM: set(), NVME: set(), TierKind.HBM: set()}
        self.events.take_snapshots_from(
            lambda: {tier.name.lower(): keys_of(*sorted(held)) for tier, held in self.held.items()}
        )
        self.due: list[Callable[[], None]] = []
        self.sent: list[bytes] = []
        self.error: Exception | None = None
        self.publisher = Publisher(
            self.events, self._say, lambda _, what: self.due.append(what), publish_s=1.0
        )
        self.replica = Replica(10_000)
        self.resyncs = 0

    def _say(self, peer: str, payload: bytes) -> None:
        assert peer == "b"
        if self.error is not None:
            raise self.error
        self.sent.append(payload)

    def store(self, tier: TierKind, *numbers: int) -> None:
        self.held[tier] |= set(numbers)
        self.events.stored(keys_of(*numbers), tier.name.lower(), NAMESPACE)

    def remove(self, tier: TierKind, *numbers: int) -> None:
        self.held[tier] -= set(numbers)
        self.events.removed(keys_of(*numbers), tier.name.lower(), MissReason.EVICTED)

    def clear(self) -> None:
        for held in self.held.values():
            held.clear()
        self.events.cleared()

    def subscribe(self) -> None:
        wish = Subscribe(self.replica.log, self.replica.sequence)
        self.publisher.subscribe("b", wish)

    def turn(self, lose: Callable[[], bool] = lambda: False) -> None:
        """Publish what is due, and take it; some of it may get lost."""
        due, self.due = self.due, []
        for one in due:
            one()
        sent, self.sent = self.sent, []
        for payload in sent:
            if lose():
                continue
            message = messages.decode(payload)
            assert isinstance(message, SnapshotPart | Delta)
            is_part = isinstance(message, SnapshotPart)
            taken = (
                self.replica.take_part(message)  # type: ignore[arg-type]
                if is_part
                else self.replica.take_delta(message)  # type: ignore[arg-type]
            )
            if not taken:
                self.resyncs += 1
                self.publisher.subscribe("b", Subscribe(0, 0))

    def settle(self) -> None:
        while self.due or self.sent:
            self.turn()

    def check(self) -> None:
        for tier in (DRAM, NVME):
            known = self.replica.holds(tier, keys_of(*range(200))).nonzero()[0].tolist()
            assert set(known) == {one for one in self.held[tier] if one < 200}


def test_a_snapshot_and_then_changes() -> None:
    wire = Wire()
    wire.store(DRAM, 1, 2, 3)
    wire.store(NVME, 2)
    wire.subscribe()
    wire.settle()
    wire.check()
    wire.store(DRAM, 4)
    wire.remove(DRAM, 2)
    wire.store(TierKind.HBM, 7)
    wire.settle()
    wire.check()
    assert wire.replica.holds(NVME, keys_of(2)).all()
    assert wire.replica.sequence == wire.events.last_sequence
    wire.clear()
    wire.store(DRAM, 9)
    wire.settle()
    wire.check()


def test_an_empty_cache_has_a_snapshot_too() -> None:
    wire = Wire()
    wire.subscribe()
    wire.settle()
    assert wire.replica.log == wire.publisher.log
    wire.store(DRAM, 1)
    wire.settle()
    wire.check()
    assert wire.resyncs == 0


def test_nothing_is_done_when_nobody_listens() -> None:
    wire = Wire()
    wire.store(DRAM, 1)
    assert not wire.due
    wire.subscribe()
    wire.settle()
    wire.publisher.unsubscribe("b")
    wire.store(DRAM, 2)
    assert not wire.due
    assert not wire.sent


def test_changes_are_gathered() -> None:
    wire = Wire()
    wire.subscribe()
    wire.settle()
    for number in range(50):
        wire.store(DRAM, number)
    assert len(wire.due) == 1
    wire.due.pop()()
    delta = messages.decode(wire.sent[0])
    assert len(wire.sent) == 1
    assert isinstance(delta, Delta)
    assert len(delta.changes) == 1


def test_who_comes_back_is_told_what_changed_only() -> None:
    wire = Wire()
    wire.store(DRAM, *range(100))
    wire.subscribe()
    wire.settle()
    wire.publisher.unsubscribe("b")
    wire.store(DRAM, 150)
    wire.subscribe()
    wire.due.pop(0)()
    assert [type(messages.decode(one)) for one in wire.sent] == [Delta]
    wire.settle()
    wire.check()


def test_who_lags_behind_the_log_starts_over() -> None:
    wire = Wire(capacity=5)
    wire.subscribe()
    wire.settle()
    for number in range(20):
        wire.store(DRAM, number)
    wire.settle()
    wire.check()
    assert wire.resyncs == 0


def test_a_full_line_is_tried_again_and_a_lost_one_is_not() -> None:
    wire = Wire()
    wire.subscribe()
    wire.settle()
    wire.error = CapacityError("full")
    wire.store(DRAM, 1)
    wire.turn()
    assert wire.due
    wire.error = None
    wire.settle()
    wire.check()
    wire.error = PeerLost("gone")
    wire.store(DRAM, 2)
    wire.settle()
    assert len(wire.publisher) == 0


def test_a_large_event_is_cut_and_large_snapshots_too() -> None:
    wire = Wire()
    many = range(40_000)
    wire.replica = Replica(100_000)
    wire.store(DRAM, *many)
    wire.subscribe()
    wire.settle()
    assert len(wire.replica) == 40_000
    wire.store(NVME, *many)
    wire.remove(DRAM, *many)
    wire.settle()
    assert wire.replica.holds(NVME, keys_of(*many)).all()
    assert not wire.replica.holds(DRAM, keys_of(*many)).any()
    assert wire.resyncs == 0


def test_deltas_go_on_where_the_last_ended() -> None:
    log = EventLog(100)
    for size in (1, 20_000, 3, 40_000, 1):
        log.stored(keys_of(*range(size)), "dram", NAMESPACE)
    deltas = list(deltas_of(5, 0, log.replay(1)))
    expected = 1
    for delta in deltas:
        assert delta.first == expected
        expected = delta.last + 1
        assert sum(len(one.keys) for one in delta.changes) <= messages.KEYS_MAX * 16
    assert expected == 6


def test_any_losses_are_noticed() -> None:
    seed = int(time.time())
    dice = random.Random(seed)
    for _ in range(30):
        wire = Wire(capacity=dice.choice([3, 30, 300]))
        wire.subscribe()
        wire.settle()
        for _ in range(dice.randint(1, 60)):
            numbers = dice.sample(range(200), dice.randint(1, 20))
            tier = dice.choice([DRAM, DRAM, NVME, TierKind.HBM])
            what = dice.random()
            if what < 0.6:
                wire.store(tier, *numbers)
            elif what < 0.97:
                wire.remove(tier, *numbers)
            else:
                wire.clear()
            if dice.random() < 0.3:
                wire.turn(lambda: dice.random() < 0.2)
        # One change that comes through tells of all that did not.
        wire.settle()
        wire.store(NVME, 0)
        wire.settle()
        try:
            wire.check()
        except AssertionError as error:
            raise AssertionError(f"seed {seed}") from error


def test_a_lost_part_makes_the_snapshot_useless() -> None:
    replica = Replica(2000)
    packed = keys_of(1, 2).tobytes()
    assert replica.take_part(SnapshotPart(7, 3, 0, False, int(DRAM), packed))
    assert not replica.take_part(SnapshotPart(7, 3, 2, True, int(DRAM), packed))
    assert not replica.take_part(SnapshotPart(7, 3, 3, True, int(DRAM), packed))
    assert len(replica) == 0
    assert not replica.take_delta(Delta(7, 4, 4, []))


def test_parts_of_two_snapshots_do_not_make_one() -> None:
    replica = Replica(2000)
    packed = keys_of(1, 2).tobytes()
    for log, sequence in ((7, 4), (8, 3)):
        assert replica.take_part(SnapshotPart(7, 3, 0, False, int(DRAM), packed))
        assert not replica.take_part(SnapshotPart(log, sequence, 1, True, int(NVME), packed))
        assert len(replica) == 0


def test_a_set_of_keys_is_bounded_and_keeps_the_newest() -> None:
    keys = KeyTable(2048)
    for start in range(0, 10_000, 500):
        keys.add(keys_of(*range(start, start + 500)))
    assert len(keys) == 2048
    assert keys.has(keys_of(*range(9_000, 10_000))).all()
    keys.remove(keys_of(*range(10_000)))
    assert len(keys) == 0


@pytest.mark.parametrize(
    "payload",
    [
        b"",
        b"\xc1",
        messages.encode(messages.Release(1, 0, b"x" * 15)),
        messages.encode(messages.Ask(1, 4096, 1.0, b"x" * 31)),
        messages.encode(messages.Ask(1, 4096, -1.0, b"x" * 16)),
        messages.encode(messages.Ask(0, 4096, 1.0, b"x" * 16)),
        messages.encode(Delta(1, 5, 3, [])),
        messages.encode(Delta(1, 5, 5, [messages.Change(9, 2, b"")])),
        messages.encode(Delta(1, 1, 1, [messages.Change(1, 2, bytes(1 << 18))] * 2)),
        messages.encode(messages.Grant(1, bytes(1 << 20), b"", b"")),
    ],
)
def test_what_is_no_message_is_refused(payload: bytes) -> None:
    with pytest.raises(UsageError):
        messages.decode(payload)


def test_every_message_comes_back_as_it_was() -> None:
    for message in (
        messages.Offer(3),
        messages.Withdrawal(3),
        Subscribe(0, 0),
        SnapshotPart(3, 9, 0, True, 2, bytes(32)),
        Delta(3, 4, 4, [messages.Change(1, 2, bytes(16))]),
        messages.Ask(1, 4096, 0.5, bytes(32)),
        messages.Grant(1, b"token", b"\0\0", b""),
        messages.Release(1, 2, bytes(16)),
    ):
        assert messages.decode(messages.encode(message)) == message

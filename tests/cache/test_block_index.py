"""The native block index held against a model, step by step, under every policy."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import rule

from kvx.errors import StaleReference
from kvx_ext import _core
from tests.cache.block_index_machine import KEYS, REASON, RETIRED, SLOTS, SideBySide, numbers
from tests.cache.block_index_model import OUTCOME, POLICY

batches = st.lists(st.integers(0, len(KEYS) - 1), max_size=10)
owners = st.integers(0, 2)


class IndexMachine(SideBySide):
    """Every call of the index, with the model beside it."""

    @rule(
        batch=batches,
        owner=owners,
        is_dirty=st.booleans(),
        ttl_s=st.sampled_from([0, 0, 1, 3]),
    )
    def reserve(self, batch: list[int], owner: int, is_dirty: bool, ttl_s: int) -> None:
        """Reserve, and remember what has to be committed."""
        evicted: list[int] = []
        want = []
        wanted_generations = []  # as each row was answered: a later row may evict an EXISTS one
        for key in batch:
            outcome, entry = self.model.reserve(
                key,
                owner,
                is_dirty=is_dirty,
                ttl_s=ttl_s,
                now_ms=self.now_ms,
                evicted=evicted,
            )
            want.append((outcome, entry))
            wanted_generations.append(0 if entry is None else self.held(entry)[1])
        outcomes, slots, generations, gone = self.index.reserve(
            KEYS[batch], owner, is_dirty, ttl_s, self.now_ms
        )
        assert outcomes.tolist() == [int(outcome) for outcome, _ in want]
        assert slots.tolist() == [-1 if e is None else e.slot for _, e in want]
        assert generations.tolist() == wanted_generations
        assert numbers(gone) == evicted
        self.writing += [
            self.held(e) for outcome, e in want if e is not None and outcome == OUTCOME.RESERVED
        ]
        self.owners_seen(owner)

    @rule(batch=batches, owner=owners, ttl_s=st.sampled_from([0, 0, 2]))
    def insert(self, batch: list[int], owner: int, ttl_s: int) -> None:
        """Reserve and commit at once."""
        evicted: list[int] = []
        want = [
            self.model.reserve(
                key,
                owner,
                is_dirty=False,
                ttl_s=ttl_s,
                now_ms=self.now_ms,
                evicted=evicted,
            )
            for key in batch
        ]
        for row, (outcome, entry) in reversed(list(enumerate(want))):
            if outcome == OUTCOME.RESERVED and entry is not None:
                entry.checksum = 1000 + row
                self.model.admit(entry)
        checksums = np.arange(1000, 1000 + len(batch), dtype=np.uint64)
        outcomes, slots, _, gone = self.index.insert(
            KEYS[batch], checksums, owner, ttl_s, self.now_ms
        )
        # A key that comes twice in a batch is in flight at its second place.
        assert outcomes.tolist() == [int(outcome) for outcome, _ in want]
        assert slots.tolist() == [-1 if e is None else e.slot for _, e in want]
        assert numbers(gone) == evicted

    @rule(data=st.data(), is_commit=st.booleans())
    def finish_writing(self, data: st.DataObject, is_commit: bool) -> None:
        """Commit or abort some reservations; some of them were cancelled meanwhile."""
        self.end_writes(data.draw(st.integers(0, len(self.writing))), is_commit=is_commit)

    @rule(batch=batches, owner=owners)
    def write_dirty(self, batch: list[int], owner: int) -> None:
        """Write blocks that have to be flushed."""
        self.reserve(batch, owner, is_dirty=True, ttl_s=0)
        self.end_writes(len(self.writing), is_commit=True)

    def end_writes(self, count: int, *, is_commit: bool) -> None:
        """Commit or abort the oldest reservations."""
        some, self.writing = self.writing[:count], self.writing[count:]
        want = []
        for entry, _ in reversed(some):
            want.append(entry.state == "reserved" or not is_commit)
            if entry.state == "reserved" and is_commit:
                entry.checksum = 77
                self.model.admit(entry)
        for entry, _ in reversed(some) if is_commit else some:
            if entry.state == "reserved":
                del self.model.named[entry.key]
                self.model.why[entry.key] = int(REASON.FAILED)
            if entry.state in ("reserved", "cancelled"):
                self.model.end(entry)
        done = (
            self.index.commit(*self.refs(some), np.full(count, 77, np.uint64))
            if is_commit
            else self.index.abort(*self.refs(some))
        )
        assert done.tolist() == want[::-1]
        again = self.index.abort(*self.refs(some))
        assert not again.any()

    @rule(batch=batches, touch=st.booleans(), pin=st.booleans())
    def match(self, batch: list[int], touch: bool, pin: bool) -> None:
        """The longest prefix."""
        rows = []
        for key in batch:
            if (entry := self.model.visible(key, self.now_ms)) is None:
                break
            rows.append(entry)
        count, *places = self.index.match(KEYS[batch], self.now_ms, touch, pin)
        assert count == len(rows)
        self.check_places(list(rows), *places)
        self.use(rows, touch=touch, pin=pin)

    @rule(batch=batches, touch=st.booleans(), pin=st.booleans())
    def lookup(self, batch: list[int], touch: bool, pin: bool) -> None:
        """Every key for itself."""
        rows = [self.model.visible(key, self.now_ms) for key in batch]
        found, *places = self.index.lookup(KEYS[batch], self.now_ms, touch, pin)
        assert found.tolist() == [e is not None for e in rows]
        self.check_places(rows, *places)
        self.use([e for e in rows if e is not None], touch=touch, pin=pin)

    @rule(batch=batches)
    def be_busy(self, batch: list[int]) -> None:
        """Touch enough to reach halvings of frequencies and turns of queues."""
        self.lookup(batch * 6, touch=True, pin=False)

    @rule(batch=st.lists(batches, max_size=4))
    def match_many(self, batch: list[list[int]]) -> None:
        """Several prefixes in one call, which changes nothing."""
        want = []
        for keys in batch:
            seen = [self.model.visible(key, self.now_ms) is not None for key in keys]
            want.append(seen.index(False) if False in seen else len(seen))
        flat = [key for keys in batch for key in keys]
        lengths = np.array([len(keys) for keys in batch], np.int64)
        counts = self.index.match_many(KEYS[np.array(flat, np.int64)], lengths, self.now_ms)
        assert counts.tolist() == want

    @rule(data=st.data())
    def unpin(self, data: st.DataObject) -> None:
        """Let some go; doomed ones become free."""
        count = data.draw(st.integers(0, len(self.pinned)))
        some, self.pinned = self.pinned[:count], self.pinned[count:]
        keys = KEYS[[entry.key for entry, _ in some]]
        assert self.index.validate(keys, *self.refs(some)).all()
        for entry, _ in some:
            self.model.unpin(entry)
        assert self.index.unpin(*self.refs(some)).all()

    @rule(batch=batches, ms=st.sampled_from([0, 500, 2000]))
    def lease(self, batch: list[int], ms: int) -> None:
        """Lease what is there."""
        rows = [e for key in batch if (e := self.model.visible(key, self.now_ms)) is not None]
        expires_ms = self.now_ms + ms if ms else 0
        number = self.index.lease(*self.refs([self.held(e) for e in rows]), expires_ms)
        for entry in rows:
            entry.pins += 1
        self.leases[number] = (expires_ms, rows)
        assert self.index.lease_is_live(number, self.now_ms)

    @rule()
    def release(self) -> None:
        """Release the oldest lease, twice."""
        if not self.leases:
            return
        number = min(self.leases)
        for entry in self.leases.pop(number)[1]:
            self.model.unpin(entry)
        assert self.index.release(number)
        assert not self.index.release(number)

    @rule(ms=st.integers(0, 1500))
    def expire(self, ms: int) -> None:
        """Let time pass."""
        self.now_ms += ms
        for number, (expires_ms, rows) in sorted(
            self.leases.items(), key=lambda at: (at[1][0], at[0])
        ):
            if expires_ms and expires_ms <= self.now_ms:
                assert not self.index.lease_is_live(number, self.now_ms)
                del self.leases[number]
                for entry in rows:
                    self.model.unpin(entry)
        # A whole round from an unknown place: the model takes the order of the index.
        gone = numbers(self.index.expire(self.now_ms, SLOTS))
        due = [
            e.key
            for e in self.model.named.values()
            if e.state == "committed" and self.model.is_expired(e, self.now_ms)
        ]
        assert sorted(gone) == sorted(due)
        for key in gone:
            self.model.remove(self.model.named[key], REASON.EXPIRED)

    @rule(batch=batches, reason=st.sampled_from([REASON.DROPPED, REASON.CORRUPT]))
    def remove(self, batch: list[int], reason: _core.RemovalReason) -> None:
        """Remove, also what is pinned, dirty or being written."""
        want = []
        for key in batch:
            if (entry := self.model.named.get(key)) is not None:
                want.append((key, entry.slot))
                self.model.remove(entry, reason)
        keys, slots = self.index.remove(KEYS[batch], int(reason))
        assert list(zip(numbers(keys), slots.tolist(), strict=True)) == want

    @rule(count=st.integers(0, 6))
    def take_dirty(self, count: int) -> None:
        """Begin to flush."""
        want = []
        while len(want) < count and (entry := self.model.coldest_dirty()) is not None:
            entry.is_flushing = True
            entry.pins += 1
            want.append(entry)
        keys, *places = self.index.take_dirty(count)
        assert numbers(keys) == [e.key for e in want]
        self.check_places(list(want), *places)
        self.flushing += [self.held(e) for e in want]

    @rule(data=st.data(), is_good=st.booleans())
    def end_flush(self, data: st.DataObject, is_good: bool) -> None:
        """End some flushes, well or not."""
        self.end_flushes(data.draw(st.integers(0, len(self.flushing))), is_good=is_good)

    @rule(count=st.integers(1, 6))
    def fail_to_flush(self, count: int) -> None:
        """Flush in vain: the same blocks are offered again."""
        self.take_dirty(count)
        self.end_flushes(len(self.flushing), is_good=False)
        self.take_dirty(count)

    def end_flushes(self, count: int, *, is_good: bool) -> None:
        """End the oldest flushes."""
        some, self.flushing = self.flushing[:count], self.flushing[count:]
        if is_good:
            for entry, _ in reversed(some):
                self.model.clean(entry)
            assert self.index.mark_clean(*self.refs(some)).all()
        for entry, _ in some:
            self.model.unpin(entry)
        assert self.index.unpin(*self.refs(some)).all()

    @rule(owner=owners, limit=st.integers(-1, 8))
    def limit(self, owner: int, limit: int) -> None:
        """Set a quota, which may evict at once."""
        self.owners_seen(owner)
        self.model.limits[owner] = limit if limit >= 0 else SLOTS + 1
        want = []
        while self.model.used(owner) > self.model.limits[owner]:
            if (victim := self.model.evict(owner)) is None:
                self.over_limit.add(owner)
                break
            want.append(victim)
        assert numbers(self.index.set_owner_limit(owner, limit)) == want

    @rule()
    def slots_come_and_go(self) -> None:
        """Retire the last slots, or bring them back."""
        first = SLOTS - RETIRED
        if not self.has_all_slots:
            self.index.add_slots(first, RETIRED)
            self.model.free += list(range(first, SLOTS))[::-1]
            self.has_all_slots = True
            return
        there = [self.model.by_slot[s] for s in range(first, SLOTS) if s in self.model.by_slot]
        is_idle = all(e.state == "committed" and not e.pins for e in there)
        assert self.index.retire_slots(first, RETIRED) == is_idle
        if not is_idle:
            return
        for entry in there:
            self.model.remove(entry, REASON.RETIRED)
        for slot in range(first, SLOTS):
            self.model.free.remove(slot)
            self.model.generation[slot] += 1
        self.has_all_slots = False

    @rule(slot=st.integers(-2, SLOTS + 2), generation=st.integers(0, 40))
    def stale_references(self, slot: int, generation: int) -> None:
        """A reference from nowhere is refused, or names what the model says it names."""
        slots, generations = (
            np.array([slot], np.int64),
            np.array([generation], np.uint32),
        )
        entry = self.model.by_slot.get(slot)
        if entry is not None and self.model.generation[slot] == generation:
            return
        checksum = np.zeros(1, np.uint64)
        for answer in (
            self.index.commit(slots, generations, checksum),
            self.index.abort(slots, generations),
            self.index.pin(slots, generations),
            self.index.unpin(slots, generations),
            self.index.mark_clean(slots, generations),
            self.index.validate(KEYS[:1], slots, generations),
        ):
            assert answer.tolist() == [False]
        with pytest.raises(StaleReference):
            self.index.lease(slots, generations, 0)


@pytest.mark.parametrize("policy", list(POLICY))
def test_index_agrees_with_the_model(policy: _core.EvictionPolicy) -> None:
    machine = type(f"{policy.name}Machine", (IndexMachine,), {"policy": policy})
    case = machine.TestCase
    case.settings = settings(
        max_examples=100,
        stateful_step_count=50,
        deadline=None,
        suppress_health_check=[HealthCheck.too_slow],
    )
    case("runTest").runTest()

"""What comes back after a restart, held against a dictionary; torn pages, failed writes."""

import os
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from kvx.cache.disk import BlockRecords, DiskStore, RecoveredPool
from kvx.cache.disk.recovery import HEAT_HALF_LIFE_S, heat_order
from kvx.errors import StorageError, UsageError
from tests.cache.disk.disk_samples import NOW_S, bytes_at, make_records, open_store, write_all

KEYS = [bytes([n]) * 16 for n in range(6)]


def rows_of(pool: RecoveredPool) -> dict[bytes, tuple[int, int]]:
    """Return key -> (slot, generation) of what was recovered."""
    keys = [key.tobytes() for key in pool.records.keys]
    return dict(
        zip(
            keys,
            zip(pool.slots.tolist(), pool.records.generations.tolist(), strict=True),
            strict=True,
        )
    )


def reopened(store: DiskStore) -> DiskStore:
    """Return the same store as another process finds it; what was not written is lost."""
    store.close()
    return open_store(store.path)


@pytest.fixture
def store(tmp_path: Path) -> Iterator[DiskStore]:
    with open_store(tmp_path / "store") as store:
        store.recover()
        store.allocate_extent(4096)
        yield store


def test_round_trip_of_all_fields_in_several_pools(tmp_path: Path) -> None:
    wanted = {}
    with open_store(tmp_path / "store") as store:
        store.recover()
        for seed, slot_bytes in enumerate((4096, 8192)):
            for _ in range(2):
                store.allocate_extent(slot_bytes)
            pool = store.pool(slot_bytes)
            slots = np.random.default_rng(seed).permutation(
                np.concatenate(
                    [np.arange(e.first_slot, e.first_slot + e.num_slots) for e in pool.extents]
                )
            )[:50]
            wanted[slot_bytes] = (slots, make_records(50, seed=seed))
            pool.set_records(*wanted[slot_bytes])
            assert pool.is_pending(slots)
        write_all(store)
        assert not pool.is_pending(slots)
    steps: list[tuple[int, int]] = []
    with open_store(tmp_path / "store") as store:
        found = store.recover(lambda done, total: steps.append((done, total)))
        assert found.counts.live == 100
        assert steps[-1][0] == steps[-1][1] == sum(e.num_slots for e in store.extents.values())
        for slot_bytes, (slots, records) in wanted.items():
            survivors = found.pools[slot_bytes]
            order = [slots.tolist().index(slot) for slot in survivors.slots]
            assert sorted(order) == list(range(50))
            for field in BlockRecords.__dataclass_fields__:
                expected = getattr(records, field)[order]
                assert (getattr(survivors.records, field) == expected).all(), field


class StoreMachine(RuleBasedStateMachine):
    """Set, kill, write, restart; the model is slot -> (sequence, key, generation, is_live)."""

    slots = st.lists(st.integers(0, 39), min_size=1, max_size=4, unique=True)

    @initialize()
    def start(self) -> None:
        self.folder = tempfile.TemporaryDirectory()
        self.store = open_store(Path(self.folder.name) / "store", capacity_bytes=1 << 20)
        self.store.recover()
        self.store.allocate_extent(4096)
        self.model: dict[int, tuple[int, bytes, int, bool]] = {}
        self.on_disk = dict(self.model)
        self.sequence = 0

    @rule(slots=slots, data=st.data())
    def set(self, slots: list[int], data: st.DataObject) -> None:
        chosen = [data.draw(st.sampled_from(KEYS)) for _ in slots]
        keys = np.frombuffer(b"".join(chosen), dtype=np.uint8).reshape(-1, 16)
        records = make_records(len(slots), seed=self.sequence, keys=keys)
        self.store.pool(4096).set_records(np.array(slots), records)
        for slot, key, generation in zip(slots, chosen, records.generations, strict=True):
            self.sequence += 1
            self.model[slot] = (self.sequence, key, int(generation), True)

    @rule(slots=slots)
    def kill(self, slots: list[int]) -> None:
        self.store.pool(4096).kill_records(np.array(slots))
        for slot in set(slots) & set(self.model):
            self.model[slot] = (*self.model[slot][:3], False)

    @rule(slots=slots)
    def touch(self, slots: list[int]) -> None:
        used = np.full(len(slots), NOW_S, dtype=np.uint64)
        self.store.pool(4096).update_heat(np.array(slots), np.full(len(slots), 9, np.uint8), used)

    @rule(heat_too=st.booleans())
    def write(self, heat_too: bool) -> None:
        write_all(self.store, self.store.flush_heat() if heat_too else None)
        self.on_disk = dict(self.model)

    @rule()
    def restart(self) -> None:
        self.store = reopened(self.store)
        self.model = dict(self.on_disk)
        newest: dict[bytes, int] = {}
        for slot, row in self.model.items():
            if row[1] not in newest or self.model[newest[row[1]]][0] < row[0]:
                newest[row[1]] = slot
        live = {
            key: (slot, self.model[slot][2]) for key, slot in newest.items() if self.model[slot][3]
        }
        found = self.store.recover()
        assert rows_of(found.pools[4096]) == live
        assert found.counts.live == len(live)
        assert found.counts.damaged == 0
        for slot, row in self.model.items():
            if slot not in newest.values() and row[3]:
                self.model[slot] = (*row[:3], False)

    @invariant()
    def mirror_is_whole(self) -> None:
        if hasattr(self, "store"):
            assert set(np.unique(self.store.extents[0].records["state"])) <= {0, 1, 2}

    def teardown(self) -> None:
        if hasattr(self, "store"):
            self.store.close()
            self.folder.cleanup()


TestStoreMachine = StoreMachine.TestCase
TestStoreMachine.settings = settings(max_examples=40, stateful_step_count=25, deadline=None)


def set_keys(store: DiskStore, slots: list[int], keys: list[bytes], **fields: int) -> BlockRecords:
    array = np.frombuffer(b"".join(keys), dtype=np.uint8).reshape(-1, 16)
    records = make_records(len(slots), keys=array)
    for name, value in fields.items():
        records = replace(records, **{name: np.full_like(getattr(records, name), value)})
    store.pool(4096).set_records(np.array(slots), records)
    return records


def test_newest_record_of_a_key_counts_and_stays_the_only_one(store: DiskStore) -> None:
    set_keys(store, [1], KEYS[:1])
    set_keys(store, [0], KEYS[:1])
    write_all(store)
    store = reopened(store)
    found = store.recover()
    assert list(rows_of(found.pools[4096])) == [KEYS[0]]
    assert found.pools[4096].slots.tolist() == [0]
    assert found.counts.superseded == 1
    # The newer one goes and its slot is reused: the older one must not come back.
    write_all(store)
    store.pool(4096).kill_records(np.array([0]))
    set_keys(store, [0], [KEYS[1]])
    write_all(store)
    with reopened(store) as again:
        assert list(rows_of(again.recover().pools[4096])) == [KEYS[1]]


def test_killing_an_older_copy_leaves_the_newer_one(store: DiskStore) -> None:
    set_keys(store, [1], KEYS[:1])
    set_keys(store, [2], KEYS[:1])
    store.pool(4096).kill_records(np.array([1]))
    write_all(store)
    with reopened(store) as again:
        assert again.recover().pools[4096].slots.tolist() == [2]


def test_dropped_block_does_not_uncover_an_older_copy(store: DiskStore) -> None:
    set_keys(store, [1], KEYS[:1])
    set_keys(store, [2], KEYS[:1])
    store.pool(4096).kill_records(np.array([2]))
    write_all(store)
    with reopened(store) as again:
        assert len(again.recover().pools[4096].slots) == 0


def test_expired_blocks_are_dropped_for_good(store: DiskStore) -> None:
    set_keys(store, [0], KEYS[:1], expiry_s=NOW_S)
    set_keys(store, [1], KEYS[1:2], expiry_s=NOW_S + 1)
    write_all(store)
    store = reopened(store)
    found = store.recover()
    assert (found.counts.live, found.counts.expired) == (1, 1)
    write_all(store)
    with reopened(store) as again:
        assert again.recover().counts.dead == 1


def test_heat_order() -> None:
    hour = HEAT_HALF_LIFE_S
    heat = np.array([8, 8, 200, 2, 1, 1, 0], dtype=np.uint8)
    ages = [0, hour, 100 * hour, 5, 5, 7, -9]
    used = np.array([NOW_S - age for age in ages], dtype=np.uint64)
    sequences = np.arange(7, dtype=np.uint64)
    # 200 uses a hundred hours ago count 0 and are older than the unused block "from the future".
    assert heat_order(heat, used, sequences, NOW_S).tolist() == [2, 6, 5, 4, 3, 1, 0]
    same = np.zeros(7, dtype=np.uint64)
    tied = heat_order(np.zeros(7, dtype=np.uint8), same, sequences[::-1].copy(), NOW_S)
    assert tied.tolist() == [6, 5, 4, 3, 2, 1, 0]


def test_heat_is_written_only_when_flushed(store: DiskStore) -> None:
    set_keys(store, [0, 1], KEYS[:2], heat=1, last_used_s=5)
    write_all(store)
    heat, used = np.array([77], dtype=np.uint8), np.array([NOW_S], dtype=np.uint64)
    store.pool(4096).update_heat(np.array([0]), heat, used)
    assert len(store.record_writes()) == 0
    assert write_all(store, store.flush_heat()) == 1
    with reopened(store) as again:
        records = again.recover().pools[4096].records
        assert dict(zip(records.heat.tolist(), records.last_used_s.tolist(), strict=True)) == {
            1: 5,
            77: NOW_S,
        }


def test_heat_of_a_free_slot_makes_no_block(store: DiskStore) -> None:
    heat, used = np.array([77], dtype=np.uint8), np.array([NOW_S], dtype=np.uint64)
    store.pool(4096).update_heat(np.array([9]), heat, used)
    write_all(store, store.flush_heat())
    with reopened(store) as again:
        assert again.recover().counts.empty == again.extents[0].num_slots


@pytest.mark.parametrize("seed", range(8))
def test_torn_sectors_leave_the_old_or_the_new_record(store: DiskStore, seed: int) -> None:
    print(f"seed {seed}")  # noqa: T201 fault tests say which seed failed
    rng = np.random.default_rng(seed)
    slots = np.arange(store.extents[0].num_slots)
    old, new = make_records(len(slots), seed=100), make_records(len(slots), seed=200)
    store.pool(4096).set_records(slots, old)
    write_all(store)
    chosen = rng.random(len(slots)) < 0.5
    killed = ~chosen & (rng.random(len(slots)) < 0.5)
    store.pool(4096).set_records(slots[chosen], new.take(chosen))
    store.pool(4096).kill_records(slots[killed])
    writes = store.record_writes()
    arrived = 0
    places = zip(writes.fds, writes.offsets, writes.addresses, writes.bytes, strict=True)
    for _, offset, address, num_bytes in places:
        for sector in range(0, int(num_bytes), 512):
            if rng.random() < 0.5:  # the power goes: this sector arrived, others did not
                with store.extents[0].path.open("r+b") as file:
                    file.seek(int(offset) + sector)
                    file.write(bytes_at(int(address) + sector, 512))
                arrived += 1
    assert arrived > 0
    with reopened(store) as again:
        found = again.recover()
    assert found.counts.damaged == 0
    pool = found.pools[4096]
    for slot, key in zip(pool.slots.tolist(), pool.records.keys, strict=True):
        allowed = [old.keys[slot].tobytes()] + [new.keys[slot].tobytes()] * bool(chosen[slot])
        assert key.tobytes() in allowed
    lost = set(slots.tolist()) - set(pool.slots.tolist())
    assert lost <= set(slots[killed].tolist())


def test_damaged_records_are_counted_and_their_slots_free(store: DiskStore) -> None:
    slots = np.arange(20)
    store.pool(4096).set_records(slots, make_records(20))
    write_all(store)
    path = store.extents[0].path
    store.close()
    with path.open("r+b") as file:
        data = bytearray(file.read(4096 + 20 * 128))
        data[4096 + 3 * 128 + 10] ^= 1  # torn: another key, were its checksum renewed
        data[4096 + 4 * 128] ^= 1  # foreign
        data[4096 + 5 * 128 : 4096 + 6 * 128] = data[4096 + 6 * 128 : 4096 + 7 * 128]
        file.seek(0)
        file.write(data)
    with open_store(path.parent) as damaged:
        counts = damaged.recover().counts
        assert (counts.live, counts.torn, counts.foreign, counts.misplaced) == (17, 1, 1, 1)
        assert counts.empty == damaged.extents[0].num_slots - 20
        # Nothing may seal what was damaged into a valid record.
        heat, used = np.full(3, 5, dtype=np.uint8), np.full(3, NOW_S, dtype=np.uint64)
        damaged.pool(4096).update_heat(np.array([3, 4, 5]), heat, used)
        write_all(damaged, damaged.flush_heat())
    with open_store(path.parent) as again:
        assert again.recover().counts.live == 17


def test_crash_between_payload_and_record_keeps_the_old_record(store: DiskStore) -> None:
    records = set_keys(store, [0], KEYS[:1])
    write_all(store)
    extent = store.extents[0]
    with extent.path.open("r+b") as file:
        file.seek(extent.header.payload_offset)
        file.write(b"new payload, its record never written")
    with reopened(store) as again:
        found = again.recover().pools[4096].records
        # The checksum is of the old payload: whoever reads the block finds out.
        assert found.checksums.tolist() == records.checksums.tolist()


def test_pages_under_way_are_not_handed_out_twice(store: DiskStore) -> None:
    pool = store.pool(4096)
    set_keys(store, [0], KEYS[:1])
    first = store.record_writes()
    assert (len(first), first.num_pages) == (1, 1)
    before = bytes(bytes_at(int(first.addresses[0]), 4096))
    set_keys(store, [1], KEYS[1:2])
    assert bytes(bytes_at(int(first.addresses[0]), 4096)) == before
    assert len(store.record_writes()) == 0
    assert pool.is_pending(np.array([0]))
    store.record_writes_done(first)
    second = store.record_writes()
    assert len(second) == 1
    # Failed: the same page must come again.
    store.record_writes_done(second, np.array([True]))
    assert pool.is_pending(np.array([1]))
    assert write_all(store) == 1
    assert not pool.is_pending(np.array([0, 1]))
    with reopened(store) as again:
        assert set(rows_of(again.recover().pools[4096])) == set(KEYS[:2])


def test_writes_of_neighbours_are_merged_and_bounded(tmp_path: Path) -> None:
    with open_store(tmp_path / "s", capacity_bytes=64 << 20, extent_bytes=60 << 20) as store:
        store.recover()
        extent = store.allocate_extent(4096)
        num_pages = extent.header.records_bytes // 4096
        assert num_pages > 300
        slots = np.arange(extent.num_slots)
        store.pool(4096).set_records(slots, make_records(len(slots)))
        first = store.record_writes(pages_max=300)
        assert first.bytes.tolist() == [1 << 20, 44 * 4096]
        assert first.offsets.tolist() == [4096, 4096 + (1 << 20)]
        rest = store.record_writes()
        assert first.num_pages + rest.num_pages == num_pages
        assert rest.offsets[0] == 4096 + 300 * 4096
        store.record_writes_done(first)
        store.record_writes_done(rest)


def test_bad_arguments_change_nothing(store: DiskStore) -> None:
    pool = store.pool(4096)
    with pytest.raises(UsageError, match="in no extent"):
        pool.set_records(np.array([0, 1 << 40]), make_records(2))
    with pytest.raises(UsageError, match="keys"):
        pool.set_records(np.array([0]), make_records(2))
    with pytest.raises(UsageError, match="slot indices"):
        store.extents[0].kill_records(np.array([-1]))
    with pytest.raises(UsageError, match="no extent of slot size"):
        store.pool(8192)
    assert len(store.record_writes()) == 0


def test_device_error_names_file_and_offset(
    store: DiskStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = reopened(store)

    def broken(*_: object) -> int:
        raise OSError(5, "Input/output error")

    with store, monkeypatch.context() as patch:
        patch.setattr(os, "preadv", broken)
        with pytest.raises(StorageError, match=r"extent-000000\.kvx: Input/output") as caught:
            store.recover()
        assert (caught.value.errno, caught.value.offset) == (5, 4096)

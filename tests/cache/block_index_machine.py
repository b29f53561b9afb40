"""An index and its model side by side: what a step starts from, and what holds after each."""

from __future__ import annotations

import numpy as np
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant

from kvx_ext import _core
from tests.cache.block_index_model import POLICY, Entry, Model

SLOTS = 12
RETIRED = 2  # the last slots come and go
NUM_KEYS = 24
KEYS = np.random.default_rng(7).integers(0, 256, (NUM_KEYS, 16), dtype=np.uint8)
NUMBER_OF = {key.tobytes(): number for number, key in enumerate(KEYS)}
REASON = _core.RemovalReason


def numbers(keys: np.ndarray) -> list[int]:
    """Turn rows of keys back into their numbers."""
    return [NUMBER_OF[key.tobytes()] for key in keys]


class SideBySide(RuleBasedStateMachine):
    """Both, and everything the test holds: writes, pins, leases, flushes."""

    policy = POLICY.LRU

    @initialize()
    def start(self) -> None:
        """Make both with the same slots."""
        self.history = _core.MissHistory(1024)
        self.index = _core.BlockIndex(self.policy, self.history)
        self.index.add_slots(0, SLOTS)
        self.model = Model(self.policy, SLOTS)
        self.model.free = list(range(SLOTS))[::-1]
        self.model.generation = dict.fromkeys(range(SLOTS), 0)
        self.now_ms = 1_000
        self.has_all_slots = True
        self.writing: list[tuple[Entry, int]] = []
        self.pinned: list[tuple[Entry, int]] = []
        self.leases: dict[int, tuple[int, list[Entry]]] = {}
        self.flushing: list[tuple[Entry, int]] = []
        self.over_limit: set[int] = set()

    def refs(self, held: list[tuple[Entry, int]]) -> tuple[np.ndarray, np.ndarray]:
        """Arrays of slots and generations."""
        return (
            np.array([entry.slot for entry, _ in held], np.int64),
            np.array([generation for _, generation in held], np.uint32),
        )

    def held(self, entry: Entry) -> tuple[Entry, int]:
        """A reference to an entry as it is now."""
        return entry, self.model.generation[entry.slot]

    def check_places(self, rows: list[Entry | None], *got: np.ndarray) -> None:
        """Demand the places the model says."""
        slots, generations, checksums = got
        assert slots.tolist() == [-1 if e is None else e.slot for e in rows]
        assert generations.tolist() == [0 if e is None else self.held(e)[1] for e in rows]
        assert checksums.tolist() == [0 if e is None else e.checksum for e in rows]

    def owners_seen(self, owner: int) -> None:
        """Keep the order in which owners appeared; ties between owners go by it."""
        if owner not in self.model.owners:
            self.model.owners.append(owner)

    def use(self, rows: list[Entry], *, touch: bool, pin: bool) -> None:
        """Touch and pin in the model."""
        for entry in rows:
            entry.pins += pin
        self.pinned += [self.held(entry) for entry in rows if pin]
        for entry in reversed(rows):
            if touch:
                self.model.touch(entry)

    @invariant()
    def agrees(self) -> None:
        """Whatever was done, both say the same of everything."""
        if not hasattr(self, "index"):
            return
        self.index.check_integrity()
        snapshot = self.index.snapshot()
        order = self.model.coldest_first()
        assert numbers(snapshot["keys"]) == order
        assert snapshot["pins"].tolist() == [self.model.named[key].pins for key in order]
        assert snapshot["dirty"].tolist() == [self.model.named[key].is_dirty for key in order]
        assert snapshot["freqs"].tolist() == [self.model.named[key].freq for key in order]
        self.over_limit = {o for o in self.over_limit if self.model.used(o) > self.model.limits[o]}
        for owner in range(3):
            used = self.index.owner_used(owner)
            assert used == self.model.used(owner)
            assert owner in self.over_limit or used <= self.model.limits.get(owner, SLOTS)
        reasons = self.history.why(KEYS).tolist()
        assert reasons == [self.model.why.get(key, 0) for key in range(NUM_KEYS)]

"""What a `BlockIndex` promises, in plain lists and dictionaries: slow, and short enough to trust.

Every list of blocks is coldest first. The model says which slot is taken and who is evicted, so a
test can demand the same of the index, step by step.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from kvx_ext import _core

POLICY = _core.EvictionPolicy
OUTCOME = _core.ReserveOutcome
SMALL, MAIN = 0, 1
GHOSTS = 8
ACCESSES_PER_SLOT = 8


@dataclass(eq=False)
class Entry:
    """One life of one slot."""

    slot: int
    key: int
    owner: int
    is_dirty: bool
    expiry_s: int
    state: str = "reserved"
    checksum: int = 0
    freq: int = 0
    queue: int = SMALL
    tick: int = 0
    pins: int = 0
    is_flushing: bool = False
    is_parked: bool = False
    is_touched: bool = False

    @property
    def needs_flush(self) -> bool:
        """Whether it is dirty and nobody is flushing it."""
        return self.is_dirty and not self.is_flushing

    @property
    def is_held(self) -> bool:
        """Whether it may not be evicted."""
        return self.is_dirty or self.pins > 0


@dataclass
class Model:
    """The index of `num_slots` slots under one policy."""

    policy: _core.EvictionPolicy
    num_slots: int
    free: list[int] = field(default_factory=list)
    named: dict[int, Entry] = field(default_factory=dict)
    by_slot: dict[int, Entry] = field(default_factory=dict)
    generation: dict[int, int] = field(default_factory=dict)
    orders: dict[tuple[int, int], list[Entry]] = field(default_factory=dict)
    parked_dirty: list[Entry] = field(default_factory=list)
    ghosts: list[int] = field(default_factory=list)
    owners: list[int] = field(default_factory=list)
    limits: dict[int, int] = field(default_factory=dict)
    why: dict[int, int] = field(default_factory=dict)
    tick: int = 0
    accesses: int = 0

    # --- order ---
    def level(self, entry: Entry) -> int:
        """The list an entry belongs to, lower goes first."""
        if self.policy == POLICY.LFU:
            return entry.freq
        if self.policy == POLICY.LFU_WITH_RECENCY:
            return entry.freq.bit_length()
        return entry.queue if self.policy == POLICY.S3FIFO else 0

    def order_of(self, entry: Entry) -> list[Entry]:
        """The list itself."""
        return self.orders.setdefault((entry.owner, self.level(entry)), [])

    def link_hot(self, entry: Entry) -> None:
        """Make it the most recent of its level."""
        self.tick += 1
        entry.tick = self.tick
        self.order_of(entry).append(entry)

    def access(self) -> None:
        """Count towards the next halving of frequencies."""
        if self.policy != POLICY.LFU_WITH_RECENCY:
            return
        self.accesses += 1
        if self.accesses < ACCESSES_PER_SLOT * self.num_slots:
            return
        self.accesses = 0
        for entry in self.by_slot.values():
            entry.freq >>= 1
        before, self.orders = self.orders, {}
        for (owner, level), order in sorted(before.items()):
            self.orders.setdefault((owner, max(level - 1, 0)), []).extend(order)

    def admit(self, entry: Entry) -> None:
        """Commit."""
        self.access()
        entry.state = "committed"
        entry.freq = 0 if self.policy == POLICY.S3FIFO else 1
        entry.queue = MAIN if self.policy == POLICY.S3FIFO and entry.key in self.ghosts else SMALL
        if entry.queue == MAIN:
            self.ghosts.remove(entry.key)
        self.link_hot(entry)

    def touch(self, entry: Entry) -> None:
        """Count a use."""
        if self.policy == POLICY.FIFO:
            return
        self.access()
        is_s3 = self.policy == POLICY.S3FIFO
        is_moved = not is_s3 and not entry.is_parked
        if is_moved:
            self.order_of(entry).remove(entry)
        entry.freq = min(entry.freq + 1, 3 if is_s3 else 255)
        if is_moved:
            self.link_hot(entry)
        entry.is_touched |= entry.is_parked

    def due(self, owner: int | None) -> list[Entry]:
        """The list whose coldest block is next, of one owner or of all."""
        scope = {at: order for at, order in self.orders.items() if order and owner in (None, at[0])}
        if not scope:
            return []
        level = min(level for _, level in scope)
        if self.policy == POLICY.S3FIFO:
            sizes = [sum(len(o) for (_, at), o in scope.items() if at == q) for q in (SMALL, MAIN)]
            is_small = sizes[SMALL] > 0 and (not sizes[MAIN] or sizes[SMALL] * 10 >= sum(sizes))
            level = SMALL if is_small else MAIN
        return min((o for (_, at), o in scope.items() if at == level), key=lambda o: o[0].tick)

    def coldest(self, owner: int | None) -> Entry | None:
        """Whom the policy would evict, held or not."""
        while order := self.due(owner):
            entry = order[0]
            is_promoted = entry.queue == SMALL and entry.freq > 1
            is_kept = entry.queue == MAIN and entry.freq > 0
            if self.policy != POLICY.S3FIFO or not (is_promoted or is_kept):
                return entry
            order.remove(entry)
            entry.freq = 0 if is_promoted else entry.freq - 1
            entry.queue = MAIN
            self.link_hot(entry)
        return None

    def evict(self, owner: int | None) -> int | None:
        """Evict one block and return its key."""
        while (entry := self.coldest(owner)) is not None:
            if not entry.is_held:
                self.remove(entry, _core.RemovalReason.EVICTED)
                return entry.key
            self.order_of(entry).remove(entry)
            entry.is_parked = True
            if entry.needs_flush:
                self.parked_dirty.append(entry)
        return None

    def unpark(self, entry: Entry) -> None:
        """Put a block back into the order once nothing holds it."""
        if not entry.is_parked or entry.is_held:
            return
        if entry.is_touched:
            self.link_hot(entry)
        else:
            self.order_of(entry).insert(0, entry)
        entry.is_parked = entry.is_touched = False

    # --- life of a slot ---
    def used(self, owner: int) -> int:
        """Slots an owner holds."""
        return sum(entry.owner == owner for entry in self.by_slot.values())

    def end(self, entry: Entry) -> None:
        """Free the slot."""
        self.generation[entry.slot] += 1
        del self.by_slot[entry.slot]
        self.free.append(entry.slot)
        entry.state = "gone"

    def remove(self, entry: Entry, reason: int) -> None:
        """Make it invisible, and free what nobody holds."""
        del self.named[entry.key]
        self.why[entry.key] = int(reason)
        if entry.state == "reserved":
            entry.state = "cancelled"
            return
        if not entry.is_parked:
            self.order_of(entry).remove(entry)
            if reason == _core.RemovalReason.EVICTED and self.policy == POLICY.S3FIFO:
                self.ghosts = (
                    [*self.ghosts, entry.key][-GHOSTS:] if not entry.queue else self.ghosts
                )
        elif entry.needs_flush:
            self.parked_dirty.remove(entry)
        entry.is_dirty = entry.is_flushing = entry.is_parked = False
        entry.state = "doomed"
        if not entry.pins:
            self.end(entry)

    def reserve(
        self,
        key: int,
        owner: int,
        *,
        is_dirty: bool,
        ttl_s: int,
        now_ms: int,
        evicted: list[int],
    ) -> tuple[_core.ReserveOutcome, Entry | None]:
        """Reserve one key."""
        known = self.named.get(key)
        if known is not None and known.state == "reserved":
            return OUTCOME.IN_FLIGHT, None
        if known is not None and not self.is_expired(known, now_ms):
            return OUTCOME.EXISTS, known
        if known is not None:
            self.remove(known, _core.RemovalReason.EXPIRED)
            evicted.append(key)
        while self.used(owner) >= self.limits.get(owner, self.num_slots + 1):
            if (victim := self.evict(owner)) is None:
                return OUTCOME.QUOTA, None
            evicted.append(victim)
        if not self.free:
            if (victim := self.evict(None)) is None:
                return OUTCOME.NO_SPACE, None
            evicted.append(victim)
        slot = self.free.pop()
        expiry_s = -(-now_ms // 1000) + ttl_s if ttl_s else 0
        entry = self.named[key] = self.by_slot[slot] = Entry(slot, key, owner, is_dirty, expiry_s)
        self.generation[slot] += 1
        return OUTCOME.RESERVED, entry

    def unpin(self, entry: Entry) -> None:
        """Drop one pin."""
        entry.pins -= 1
        if entry.pins:
            return
        if entry.state == "doomed":
            self.end(entry)
            return
        if entry.is_flushing:
            entry.is_flushing = False
            if entry.is_parked:
                self.parked_dirty.append(entry)
        self.unpark(entry)

    def clean(self, entry: Entry) -> None:
        """It was flushed."""
        if entry.is_parked and entry.needs_flush:
            self.parked_dirty.remove(entry)
        entry.is_dirty = entry.is_flushing = False
        if entry.state == "committed":
            self.unpark(entry)

    def coldest_dirty(self) -> Entry | None:
        """The block to flush next."""
        if self.parked_dirty:
            return self.parked_dirty.pop(0)
        firsts = [
            (at[1], entry.tick, entry)
            for at, order in self.orders.items()
            if (entry := next((e for e in order if e.needs_flush), None)) is not None
        ]
        return min(firsts, key=lambda first: first[:2])[2] if firsts else None

    # --- reading ---
    def is_expired(self, entry: Entry, now_ms: int) -> bool:
        """Whether its time is over."""
        return bool(entry.expiry_s) and entry.expiry_s * 1000 <= now_ms

    def visible(self, key: int, now_ms: int) -> Entry | None:
        """The block a reader may see."""
        entry = self.named.get(key)
        is_there = entry is not None and entry.state == "committed"
        return (
            entry if entry is not None and is_there and not self.is_expired(entry, now_ms) else None
        )

    def coldest_first(self) -> list[int]:
        """Keys in the order of a snapshot."""
        committed = [e for e in self.named.values() if e.state == "committed"]
        return [e.key for e in sorted(committed, key=lambda e: (self.level(e), e.tick))]

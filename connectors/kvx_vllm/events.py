"""What kvx's tiers stored and let go, as vLLM's KV events name it.

kvx's log speaks of 16-byte keys, which cannot be turned back into hashes. So each rank remembers
the hashes of what it stores and loads, reads the log when a step ends, and tells the scheduler in
hashes. Where events are off, none of this is there.
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from vllm.v1.kv_offload.base import Locality, Medium, OffloadingEvent, make_offload_key

import kvx

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

    from vllm.v1.kv_offload.base import OffloadKey

    from kvx_vllm.rank_cache import RankCache

_log = logging.getLogger(__name__)
_KEY_BYTES = 16
# Blocks on their way into a tier, and blocks that tiers hold: about 250 bytes each.
AWAITED_MAX = 1 << 16
HELD_MAX = 1 << 20


@dataclass(frozen=True, slots=True)
class Residence:
    """What vLLM calls a tier.

    Attributes:
        medium: One of its two.
        locality: As seen from this engine.
        ownership: Tells tiers of the same medium apart; None for the one that stores come to.
        removal_expected: Whether it is always said when a block leaves.
    """

    medium: Medium
    locality: Locality
    ownership: str | None
    removal_expected: bool


# No medium of vLLM means GPU memory beside its own: what the HBM tier holds is not announced.
RESIDENCES = {
    "dram": Residence(Medium.CPU, Locality.LOCAL, None, removal_expected=True),
    "nvme": Residence(Medium.STORAGE, Locality.LOCAL, "nvme", removal_expected=True),
    "s3": Residence(Medium.STORAGE, Locality.REMOTE, "s3", removal_expected=False),
}
_BITS = {tier: 1 << place for place, tier in enumerate(RESIDENCES)}


@dataclass(slots=True)
class TierChange:
    """Blocks that came to a tier of a rank, or left it; crosses processes inside vLLM.

    Attributes:
        rank: Whose tier.
        tier: Its name.
        is_removed: Whether they left.
        group: Place among the connector's groups.
        hashes: vLLM's, of the blocks.
    """

    rank: int
    tier: str
    is_removed: bool
    group: int
    hashes: list[bytes]


@dataclass(slots=True)
class _Known:
    """A block by vLLM's name, and the tiers that are said to hold it, a bit each."""

    group: int
    block_hash: bytes
    tiers: int = 0


class EventReader:
    """Reads the log of a rank's cache. Of the worker's thread alone."""

    def __init__(self, rank_cache: RankCache, rank: int) -> None:
        """Begin behind what the log holds: blocks from before a restart are not announced."""
        self._cache = rank_cache
        self._rank = rank
        self._sequence = rank_cache.cache.events.last_sequence
        self._awaited: OrderedDict[bytes, _Known] = OrderedDict()
        self._held: dict[bytes, _Known] = {}
        self._is_untold = False

    def expect(self, group: int, hashes: Sequence[bytes]) -> None:
        """Remember blocks that are about to be stored or loaded; under 1 us each."""
        rows = np.frombuffer(b"".join(hashes), np.uint8).reshape(len(hashes), -1)
        keys = self._cache.groups[group].space.namespace.keys(rows).tobytes()
        for place, block_hash in enumerate(hashes):
            key = keys[place * _KEY_BYTES : (place + 1) * _KEY_BYTES]
            if key not in self._held:
                self._await(key, _Known(group, block_hash))

    def read(self) -> list[TierChange]:
        """Return what changed since the last call, in order."""
        events = self._cache.cache.events
        if events.last_sequence == self._sequence:
            return []
        try:
            news = events.replay(self._sequence + 1)
        except kvx.StaleReference as error:
            _log.warning("KV events: %s", error)
            return self._start_over()
        ours = {group.space.namespace.public_id for group in self._cache.groups}
        changes: list[TierChange] = []
        for event in news:
            self._sequence = event.sequence
            self._follow(changes, event, ours)
        return changes

    def _follow(
        self,
        changes: list[TierChange],
        event: kvx.BlockStored | kvx.BlockRemoved | kvx.AllBlocksCleared,
        ours: set[bytes],
    ) -> None:
        if isinstance(event, kvx.AllBlocksCleared):
            for key in list(self._held):
                self._leave(changes, key, RESIDENCES)
        elif event.tier not in RESIDENCES:
            return
        elif isinstance(event, kvx.BlockRemoved):
            for key in _cut(event.keys):
                self._leave(changes, key, (event.tier,))
        elif event.namespace in ours:  # else it was on its way while the cache was reset
            for key in _cut(event.keys):
                self._come(changes, key, event.tier)

    def _start_over(self) -> list[TierChange]:
        """Return the differences between what was told and what the tiers hold now."""
        snapshot = self._cache.cache.events.snapshot()
        self._sequence = snapshot.sequence
        changes: list[TierChange] = []
        for tier, rows in snapshot.keys.items():
            if tier not in RESIDENCES:
                continue
            now = set(_cut(rows.tobytes()))
            for key in [one for one, known in self._held.items() if known.tiers & _BITS[tier]]:
                if key not in now:
                    self._leave(changes, key, (tier,))
            for key in now:
                if key in self._held or key in self._awaited:
                    self._come(changes, key, tier)
        return changes

    def _come(self, changes: list[TierChange], key: bytes, tier: str) -> None:
        known = self._held.get(key) or self._awaited.get(key)
        if known is None or (key not in self._held and len(self._held) >= HELD_MAX):
            if not self._is_untold:
                self._is_untold = True
                _log.warning("KV events: some blocks in %s are not announced: too many", tier)
            return
        self._awaited.pop(key, None)
        self._held[key] = known
        if not known.tiers & _BITS[tier]:
            known.tiers |= _BITS[tier]
            self._say(changes, known, tier, is_removed=False)

    def _leave(self, changes: list[TierChange], key: bytes, tiers: Iterable[str]) -> None:
        known = self._held.get(key)
        if known is None:
            return
        for tier in tiers:
            if known.tiers & _BITS[tier]:
                known.tiers ^= _BITS[tier]
                self._say(changes, known, tier, is_removed=True)
        if not known.tiers:
            # It may be on its way in again already.
            del self._held[key]
            self._await(key, known)

    def _await(self, key: bytes, known: _Known) -> None:
        self._awaited[key] = known
        self._awaited.move_to_end(key)
        if len(self._awaited) > AWAITED_MAX:
            self._awaited.popitem(last=False)

    def _say(
        self, changes: list[TierChange], known: _Known, tier: str, *, is_removed: bool
    ) -> None:
        last = changes[-1] if changes else None
        if (
            last is None
            or last.tier != tier
            or last.is_removed is not is_removed
            or last.group != known.group
        ):
            last = TierChange(self._rank, tier, is_removed, known.group, [])
            changes.append(last)
        last.hashes.append(known.block_hash)


class Announcer:
    """Turns what ranks say into vLLM's events, in the scheduler.

    A block is in a tier when all ranks have it there, and no more when the first has lost it.
    """

    def __init__(self, num_ranks: int, group_ids: Mapping[int, int]) -> None:
        """Have nothing to tell.

        Args:
            num_ranks: Of the engine.
            group_ids: vLLM's number of each of the connector's groups.
        """
        self._num_ranks = num_ranks
        self._group_ids = group_ids
        self._ranks: dict[tuple[str, bytes], set[int]] = {}
        self._events: list[OffloadingEvent] = []

    def note(self, changes: Iterable[TierChange]) -> None:
        """Take what ranks say."""
        for change in changes:
            group_id = self._group_ids[change.group]
            keys = [make_offload_key(one, group_id) for one in change.hashes]
            if self._num_ranks > 1:
                keys = [key for key in keys if self._is_turn(change, key)]
            if keys:
                self._events.append(_event(RESIDENCES[change.tier], keys, change.is_removed))

    def take(self) -> Iterator[OffloadingEvent]:
        """Yield the events since the last call."""
        events, self._events = self._events, []
        yield from events

    def _is_turn(self, change: TierChange, key: OffloadKey) -> bool:
        """Note one block of one rank; return whether that changes what all of them hold."""
        place = (change.tier, key)
        ranks = self._ranks.setdefault(place, set())
        was_whole = len(ranks) == self._num_ranks
        if change.is_removed:
            ranks.discard(change.rank)
        else:
            ranks.add(change.rank)
        if not ranks:
            del self._ranks[place]
        return was_whole != (len(ranks) == self._num_ranks)


def _event(where: Residence, keys: list[OffloadKey], is_removed: bool) -> OffloadingEvent:  # noqa: FBT001
    return OffloadingEvent(
        keys, where.medium, is_removed, where.locality, where.ownership, where.removal_expected
    )


def _cut(packed: bytes) -> Iterator[bytes]:
    for start in range(0, len(packed), _KEY_BYTES):
        yield packed[start : start + _KEY_BYTES]

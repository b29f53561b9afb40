"""Blocks that only objects hold, for one onboard: read in ranges, landed in DRAM slots, handed on.

Each read brings consecutive blocks of one object; the first few, so that a block is on its way to
the engine soon, the next more, so that a request is worth it. As many are under way as the tier may
have: a line that is long is kept full, and whenever one ends the next begins.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from kvx.cache.inbound import Inbound
from kvx.cache.operation import REASON_OF_CODE
from kvx.cache.reactor import Step
from kvx.cache.reasons import MissReason
from kvx.cache.result import TierKind
from kvx.cache.s3.reads import Request
from kvx.transfer.codes import Code

if TYPE_CHECKING:
    from collections.abc import Iterator

    import numpy.typing as npt

    from kvx.cache.onboard import Onboard
    from kvx.cache.s3.reading import ObjectRead
    from kvx.cache.s3.tier import S3Tier

    Rows = npt.NDArray[np.int64]

# A request costs the client and the service about as much as a MiB, so reads are large; but those
# that begin are small: the first block is to be there soon (docs/decisions/0012).
_PART_BYTES_FIRST = 2 << 20
_PART_BYTES_MAX = 16 << 20
# Under way for each request that there may be. A line is full with its rate times its round trip,
# 128 MiB at 1 GB/s and 0.1 s; more is only more memory.
_UNDER_WAY_BYTES = 8 << 20
# Of as much as that the first block is brought before all others, for so long at most: about what
# a near service takes for one. A far one is not waited for; the head start is all that it takes.
_ALONE_BYTES = 32 << 20
_ALONE_S = 0.008
_ROOM_S = 0.005
# What is under way may take one in so many slots.
_ROOM_SHARE = 2
# As the tier says it: a frame that has expired, and an object that is not there, which says nothing
# about why the block is missing here.
_REASON_OF_CODE = REASON_OF_CODE.copy()
_REASON_OF_CODE[Code.STALE] = MissReason.EXPIRED
_REASON_OF_CODE[Code.SKIPPED] = MissReason.HIT


@dataclass(frozen=True, slots=True)
class Part:
    """Consecutive blocks of one object.

    Attributes:
        last_key: What the object is named by.
        first: Place of the first block wanted.
        rows: (n,) int64, the operation's rows, in order.
        keys: (n, 16) uint8, of the blocks wanted.
    """

    last_key: bytes
    first: int
    rows: Rows
    keys: npt.NDArray[np.uint8]


class S3Fetches:
    """What one onboard fetches from objects."""

    def __init__(self, operation: Onboard, tier: S3Tier) -> None:
        """Have fetched nothing."""
        self._operation = operation
        self._tier = tier
        self._is_tried = np.zeros(len(operation.keys), np.bool_)
        self._part_bytes = _PART_BYTES_FIRST
        self._first: ObjectRead | None = None
        self._alone_until = 0.0
        self._has_left = False
        # No room was found: not asked in vain again before this time.
        self._not_before = 0.0
        # What may not have ended yet, and how many blocks each brings.
        self._under_way: list[tuple[ObjectRead, int]] = []
        self._blocks_max = min(
            tier.config.max_in_flight * _UNDER_WAY_BYTES // operation.block_bytes,
            operation.pool.index.num_slots // _ROOM_SHARE,
        )

    def launch(self, rows: Rows) -> Rows:
        """Begin to read rows that objects hold; returns those that none holds.

        REQUIRES: the operation's lock is held.
        """
        self._has_left = False
        rest = self._is_tried[rows]
        if rest.all() or not self._tier.is_up():
            return rows
        if not self._is_looked_up(rows):
            self._operation.postpone(rows)
            return rows[:0]
        found = self._tier.known.find(self._operation.keys[rows])
        rest |= ~found.mask
        taken = np.flatnonzero(~rest)
        ahead = self._ahead(rows, taken)
        begun = [rows[:0]]
        for part in self._parts(rows[ahead], found.groups[ahead], found.places[ahead]):
            if len(begun) > 1 and self._is_cut_short(part, rows):
                break
            if not self._has_room(2) or not self._begin(part):
                break
            begun.append(part.rows)
        left = np.setdiff1d(rows[taken], np.concatenate(begun), assume_unique=True)
        self._operation.postpone(left)
        self._has_left = len(left) > 0
        return rows[rest]

    def is_full(self) -> bool:
        """Return whether rows were postponed that there is still no room for.

        REQUIRES: the operation's lock is held.
        """
        # Many small reads begin together: to look for a single one costs more than it brings.
        return self._has_left and (self._is_first_alone() or not self._has_room(1))

    def _has_room(self, rounds: int) -> bool:
        """Return whether less is under way than so many rounds of requests, and than is allowed."""
        self._under_way = [one for one in self._under_way if not one[0].is_terminal()]
        return (
            time.monotonic() >= self._not_before
            and len(self._under_way) < rounds * self._tier.config.max_in_flight
            and sum(num_blocks for _, num_blocks in self._under_way) < max(1, self._blocks_max)
        )

    def _is_cut_short(self, part: Part, rows: Rows) -> bool:
        """Return whether a part ends where it does because `rows` do, with more to come."""
        return (
            len(self._operation.waiting) > 0
            and part.rows[-1] == rows[-1]
            and part.first + len(part.rows) < self._tier.config.blocks_per_object
            and (len(part.rows) + 1) * self._operation.block_bytes <= self._part_bytes
        )

    def _ahead(self, rows: Rows, taken: Rows) -> Rows:
        """Return which of the places `taken` in `rows` to read now; of many, the first one alone.

        Beside others it would share the line with them, and come no sooner than they do.
        """
        operation = self._operation
        is_much = len(taken) * operation.block_bytes >= _ALONE_BYTES
        if self._first is not None or not is_much:
            return taken
        self._alone_until = time.monotonic() + _ALONE_S
        operation.shared.reactor.call_later(_ALONE_S, operation.pump)
        return taken[[int(np.argmin(rows[taken]))]]

    def _is_first_alone(self) -> bool:
        return (
            self._first is not None
            and not self._first.is_terminal()
            and time.monotonic() < self._alone_until
        )

    def _is_looked_up(self, rows: Rows) -> bool:
        """Have objects looked for that nobody has matched; False while a prefetch waits for that.

        Somebody who is about to compute what is missing does not wait: for them there is `match`.
        """
        operation = self._operation
        first = int(rows.min())
        is_final = self._tier.look_up(operation.namespace_id, operation.keys, first, 0.0)
        return is_final or not operation.is_prefetch

    def _parts(self, rows: Rows, groups: Rows, places: Rows) -> Iterator[Part]:
        """Cut rows where objects end, where blocks between are not wanted, and where it is much."""
        order = np.lexsort((places, groups))
        rows, groups, places = rows[order], groups[order], places[order]
        begin = 0
        for end in range(1, len(rows) + 1):
            if (
                end < len(rows)
                and groups[end] == groups[begin]
                and places[end] == places[end - 1] + 1
                and end - begin < self._part_bytes // self._operation.block_bytes
            ):
                continue
            group_keys = self._tier.known.keys_of(int(groups[begin]))
            wanted = self._operation.keys[rows[begin:end]]
            # Otherwise the group's number was given to another one since it was found.
            if np.array_equal(group_keys[places[begin:end]], wanted):
                last_key = group_keys[-1].tobytes()
                yield Part(last_key, int(places[begin]), rows[begin:end], wanted)
            self._part_bytes = min(2 * self._part_bytes, _PART_BYTES_MAX)
            begin = end

    def _begin(self, part: Part) -> bool:
        """Begin to read a part; False when there is no room for it now."""
        operation = self._operation
        inbound, has_slot = Inbound.reserve(
            operation, part.rows, np.zeros(len(part.rows), np.int64)
        )
        if not has_slot.all():
            # Less may fit in, and grows again when it does.
            self._part_bytes = len(part.rows) * operation.block_bytes // 2
            self._not_before = time.monotonic() + _ROOM_S
            inbound.give_back(operation)
            return False
        operation.tiers[part.rows] = TierKind.S3
        tier = self._tier
        read = tier.reads.make(len(part.rows))
        self._first = self._first or read
        self._under_way.append((read, len(part.rows)))
        step = Step(
            read,
            settle=lambda _: self._settle(read, inbound),
            give_up=operation.give_up,
            keep=operation.shared.dram,
            is_window=False,
        )
        operation.add_fetch(step)
        operation.shared.reactor.adopt(step)
        ends_at = min(tier.ends_at(), time.monotonic() + operation.remaining_s())
        addresses = operation.pool.addresses(inbound.slots)
        tier.reads.begin(read, Request(operation.namespace_id, part, addresses, ends_at))
        return True

    def _settle(self, read: ObjectRead, inbound: Inbound) -> None:
        codes, operation = read.codes(), self._operation
        arrived = codes == Code.OK
        missed, came = inbound.only(~arrived), inbound.only(arrived)
        missed.give_back(operation)
        if len(missed.rows):
            reasons = _REASON_OF_CODE[codes[~arrived]]
            self._is_tried[missed.rows] = True
            operation.look_elsewhere(missed.rows, reasons)
        came.hand_on(operation, read.checksums()[arrived], TierKind.S3)
        operation.step_over(read)

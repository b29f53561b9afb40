"""Blocks that only objects hold, for one onboard: read in ranges, landed in DRAM slots, handed on.

Each read brings consecutive blocks of one object; the first few, so that a block is on its way to
the engine soon, the next more, so that a request is worth it.
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
# that begin are small: the first block is to be there soon.
_PART_BYTES_FIRST = 2 << 20
_PART_BYTES_MAX = 8 << 20
# Of as much as that the first block is brought before all others.
_ALONE_BYTES = 32 << 20
_ROOM_S = 0.005
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
        self._has_begun = False
        self._first: ObjectRead | None = None
        # No room was found: not asked in vain again before this time.
        self._not_before = 0.0

    def launch(self, rows: Rows) -> Rows:
        """Begin to read rows that objects hold; returns those that none holds.

        REQUIRES: the operation's lock is held.
        """
        rest = self._is_tried[rows]
        if rest.all() or not self._tier.is_up():
            return rows
        if not self._is_looked_up(rows):
            self._operation.postpone(rows)
            return rows[:0]
        found = self._tier.known.find(self._operation.keys[rows])
        rest |= ~found.mask
        taken = np.flatnonzero(~rest)
        if len(taken) and time.monotonic() < self._not_before:
            self._operation.postpone(rows[taken])
            return rows[rest]
        taken = self._ahead(rows, taken)
        for part in self._parts(rows[taken], found.groups[taken], found.places[taken]):
            self._begin(part)
        return rows[rest]

    def _ahead(self, rows: Rows, taken: Rows) -> Rows:
        """Return which of the places `taken` in `rows` to read now; of many, the first one alone.

        Beside others it would share the line with them, and come no sooner than they do.
        """
        if self._first is not None and not self._first.is_terminal():
            self._operation.postpone(rows[taken])
            return taken[:0]
        is_much = len(taken) * self._operation.block_bytes >= _ALONE_BYTES
        if self._has_begun or not is_much:
            return taken
        first = taken[int(np.argmin(rows[taken]))]
        self._operation.postpone(rows[taken[taken != first]])
        return np.array([first], np.int64)

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
            if np.array_equal(group_keys[places[begin:end]], wanted):
                last_key = group_keys[-1].tobytes()
                yield Part(last_key, int(places[begin]), rows[begin:end], wanted)
            else:  # the group's number was given to another one since it was found
                self._operation.postpone(rows[begin:end])
            self._part_bytes = min(2 * self._part_bytes, _PART_BYTES_MAX)
            begin = end

    def _begin(self, part: Part) -> None:
        operation = self._operation
        operation.tiers[part.rows] = TierKind.S3
        inbound, has_slot = Inbound.reserve(
            operation, part.rows, np.zeros(len(part.rows), np.int64)
        )
        if not has_slot.all():
            self._not_before = time.monotonic() + _ROOM_S
            inbound.give_back(operation)
            operation.look_again(part.rows, np.zeros(len(part.rows), np.uint8))
            return
        tier = self._tier
        read = tier.reads.make(len(part.rows))
        if not self._has_begun:
            self._has_begun, self._first = True, read
        step = Step(
            read,
            settle=lambda _: self._settle(read, inbound),
            give_up=operation.give_up,
            keep=operation.shared.dram,
        )
        operation.add_fetch(step)
        operation.shared.reactor.adopt(step)
        ends_at = min(tier.ends_at(), time.monotonic() + operation.remaining_s())
        addresses = operation.pool.addresses(inbound.slots)
        tier.reads.begin(read, Request(operation.namespace_id, part, addresses, ends_at))

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

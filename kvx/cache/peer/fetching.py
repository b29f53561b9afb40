"""Blocks that only peers have, for one onboard: asked for, read into DRAM slots, and handed on.

    reserve slots here -> ask the peer for a lease -> read under it, verified -> commit -> release

A window of blocks goes to each peer at a time, several are under way. What a peer does not bring is
looked for at the next one that has it. Bytes only ever land in slots that are reserved for them,
and count once they match the checksum that the owner took when the block was stored.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from kvx.cache.operation import REASON_OF_CODE
from kvx.cache.peer.messages import KEYS_MAX
from kvx.cache.pool import Found
from kvx.cache.reactor import Step
from kvx.cache.reasons import MissReason
from kvx.cache.result import TierKind
from kvx.errors import KvxError, PeerLost, StaleReference, UsageError
from kvx.transfer.codes import Code
from kvx_ext import _core

if TYPE_CHECKING:
    import numpy.typing as npt

    from kvx.cache.onboard import Onboard
    from kvx.cache.peer.asking import LeaseAsk, PeerRead
    from kvx.cache.peer.messages import Grant
    from kvx.cache.peer.source import Source
    from kvx.cache.peer.tier import PeerTier
    from kvx.transfer.agents.lease_token import RemoteLease

    Rows = npt.NDArray[np.int64]
    Mask = npt.NDArray[np.bool_]

_log = logging.getLogger(__name__)
# So small that a slow link brings one within the deadline of a peer.
_WINDOW_BYTES = 16 << 20
_SOURCES_MAX = 64
_RESERVED = int(_core.ReserveOutcome.RESERVED)
# What an owner says of blocks that it may well have a moment later.
_BUSY = (int(MissReason.NO_ROOM), int(MissReason.IN_FLIGHT))


@dataclass(frozen=True, slots=True)
class _Fetch:
    """Rows on their way from one peer, and the DRAM slots they go to.

    `is_shared` is False where the slot is private to the operation and is let go afterwards.
    """

    source: Source
    rows: Rows
    slots: npt.NDArray[np.int64]
    generations: npt.NDArray[np.uint32]
    is_shared: Mask

    def only(self, mask: Mask) -> _Fetch:
        """Return the rows where `mask` holds."""
        return _Fetch(
            self.source, self.rows[mask], self.slots[mask], self.generations[mask],
            self.is_shared[mask],
        )  # fmt: skip


class PeerFetches:
    """What one onboard fetches from peers."""

    def __init__(self, operation: Onboard, tier: PeerTier) -> None:
        """Have fetched nothing."""
        self._operation = operation
        self._tier = tier
        self._shared = operation.shared
        self._block_bytes = operation.block_bytes
        # Who was asked for a row in vain, a bit each.
        self._tried = np.zeros(len(operation.keys), np.uint64)
        self._bits: dict[int, np.uint64] = {}
        # Rows that a peer did not bring in time, though the operation had time left.
        self.is_late = np.zeros(len(operation.keys), np.bool_)

    def launch(self, rows: Rows) -> Rows:
        """Ask peers for rows that they hold; returns those that nobody has.

        REQUIRES: the operation's lock is held.
        """

        def is_open(source: Source) -> Mask:
            open_rows: Mask = (self._tried[rows] & self._bit(source)) == 0
            return open_rows

        rest = np.ones(len(rows), np.bool_)
        keys = self._operation.keys[rows]
        for source, places in self._tier.choose(keys, self._block_bytes, is_open):
            rest[places] = False
            self._launch_from(source, rows[places])
        return rows[rest]

    def _bit(self, source: Source) -> np.uint64:
        place = min(len(self._bits), _SOURCES_MAX - 1)
        return self._bits.setdefault(source.ordinal, np.uint64(1 << place))

    def _launch_from(self, source: Source, rows: Rows) -> None:
        operation, size = self._operation, self._block_bytes
        window = max(1, min(_WINDOW_BYTES // size, KEYS_MAX))
        count = self._tier.take_budget(min(len(rows), window), size)
        operation.postpone(rows[count:])
        rows = rows[:count]
        if not count:
            return
        reservation = operation.reserve(rows, np.zeros(len(rows), np.int64))
        has_slot = reservation.slots >= 0
        # Without a slot for now: no room, or the block has just arrived in DRAM. Looked at again.
        operation.postpone(rows[~has_slot])
        self._tier.give_budget(int((~has_slot).sum()), size)
        if has_slot.any():
            fetch = _Fetch(
                source, rows, reservation.slots, reservation.generations,
                reservation.outcomes == _RESERVED,
            )  # fmt: skip
            self._ask(fetch.only(has_slot))

    def _ask(self, fetch: _Fetch) -> None:
        operation, source = self._operation, fetch.source
        source.add_load(len(fetch.rows) * self._block_bytes)
        operation.tiers[fetch.rows] = TierKind.PEER
        ask = self._tier.new_ask(source, len(fetch.rows), operation.remaining_s())
        step = Step(
            ask,
            settle=lambda _: self._settle_ask(ask, fetch),
            give_up=operation.give_up,
            keep=self._shared.dram,
        )
        operation.add_fetch(step)
        self._shared.reactor.adopt(step)
        self._tier.send(ask, operation.keys[fetch.rows], self._block_bytes)

    def _settle_ask(self, ask: LeaseAsk, fetch: _Fetch) -> None:
        if ask.grant is None:
            self._note_source(ask, is_failure=ask.code != Code.CANCELLED)
            self._fail(fetch, np.full(len(fetch.rows), REASON_OF_CODE[ask.code], np.uint8))
        else:
            self._take_grant(ask, self._take_answer(fetch, ask.grant), ask.grant)
        self._operation.step_over(ask)

    def _take_answer(self, fetch: _Fetch, grant: Grant) -> _Fetch:
        """Let go of what the peer does not lend; returns the rest, as many as the lease has."""
        reasons = np.frombuffer(grant.reasons, np.uint8)
        if len(reasons) != len(fetch.rows):
            reasons = np.full(len(fetch.rows), int(MissReason.TIER_DOWN), np.uint8)
        granted = reasons == MissReason.HIT
        is_busy = np.isin(reasons, _BUSY)
        is_gone = ~granted & ~is_busy
        if is_gone.any():
            fetch.source.replica.forget(self._operation.keys[fetch.rows[is_gone]])
        # Why it is missing there says nothing about why it is missing here.
        self._fail(fetch.only(is_gone), np.zeros(int(is_gone.sum()), np.uint8))
        # Who lends some of it lends the rest when those are back.
        self._fail(fetch.only(is_busy), reasons[is_busy], may_retry=bool(granted.any()))
        return fetch.only(granted)

    def _take_grant(self, ask: LeaseAsk, fetch: _Fetch, grant: Grant) -> None:
        if not len(fetch.rows):
            return
        try:
            lease = ask.source.peer.lease(grant.token)
            checksums = check_lease(lease, self._operation.keys[fetch.rows], self._block_bytes)
        except KvxError as error:
            self._refuse(ask, fetch, error)
            return
        indices = np.arange(len(fetch.rows))
        if grant.ttls_s:
            fetch, indices = self._with_expiry(fetch, grant)
        if not len(fetch.rows) or self._operation.is_over:
            self._tier.release(ask, 0)
            self._fail(fetch, np.zeros(len(fetch.rows), np.uint8), may_retry=True)
            return
        try:
            self._begin_read(ask, fetch, lease, indices, checksums[indices])
        except KvxError as error:
            self._refuse(ask, fetch, error)

    def _begin_read(
        self,
        ask: LeaseAsk,
        fetch: _Fetch,
        lease: RemoteLease,
        indices: Rows,
        checksums: npt.NDArray[np.uint64],
    ) -> None:
        addresses = self._operation.pool.addresses(fetch.slots)
        read = self._tier.read(ask, lease, indices, addresses, self._block_bytes)
        step = Step(
            read,
            settle=lambda _: self._settle_read(read, ask, fetch, checksums),
            give_up=lambda _: self._late(read),
            keep=self._shared.dram,
        )
        self._operation.add_fetch(step)
        self._shared.reactor.adopt(step)
        read.tell(self._shared.reactor.ended)

    def _refuse(self, ask: LeaseAsk, fetch: _Fetch, error: KvxError) -> None:
        """Let blocks go that cannot be read although they were leased."""
        if not isinstance(error, PeerLost | StaleReference):
            _log.warning("blocks of %s are not read: %s", ask.source.name, error)
        self._tier.release(ask, 0)
        is_stale = isinstance(error, StaleReference)
        reason = MissReason.STALE if is_stale else MissReason.TIER_DOWN
        self._fail(fetch, np.full(len(fetch.rows), int(reason), np.uint8))

    def _with_expiry(self, fetch: _Fetch, grant: Grant) -> tuple[_Fetch, Rows]:
        """Exchange slots for such that expire when the owner's do; some may find none."""
        ttls_s = np.frombuffer(grant.ttls_s, "<u4").astype(np.int64)
        if len(ttls_s) != len(fetch.rows):
            ttls_s = np.ones(len(fetch.rows), np.int64)
        expiring = (ttls_s > 0) & fetch.is_shared
        old, rows = fetch.only(expiring), fetch.rows[expiring]
        self._operation.pool.index.abort(old.slots, old.generations)
        expiries_s = self._shared.now_ms() // 1000 + ttls_s[expiring]
        fresh = self._operation.reserve(rows, expiries_s)
        fetch.slots[expiring], fetch.generations[expiring] = fresh.slots, fresh.generations
        fetch.is_shared[expiring] = fresh.outcomes == _RESERVED
        has_slot = fetch.slots >= 0
        left = fetch.rows[~has_slot]
        self._unload(fetch.source, len(left))
        self._operation.look_again(left, np.zeros(len(left), np.uint8))
        return fetch.only(has_slot), np.flatnonzero(has_slot)

    def _late(self, read: PeerRead) -> None:
        """A read was ended and a thread is still at its memory: settled when that has let go."""
        if read.state() == "cancelled" or self._operation.remaining_s() <= 0:
            self._operation.give_up(read)
        else:
            self._shared.reactor.call_later(
                self._operation.remaining_s(), self._operation.pump
            )  # fmt: skip

    def _settle_read(
        self, read: PeerRead, ask: LeaseAsk, fetch: _Fetch, checksums: npt.NDArray[np.uint64]
    ) -> None:
        codes = read.codes()
        arrived = codes == Code.OK
        reasons = REASON_OF_CODE[codes]
        damaged = self._operation.keys[fetch.rows[codes == Code.CORRUPT]]
        self._tier.release(ask, int(arrived.sum()), damaged)
        if len(damaged):
            fetch.source.replica.forget(damaged)
            self._shared.instruments.note_corrupt(TierKind.PEER, len(damaged))
        is_failure = bool(np.isin(reasons, (MissReason.TIER_DOWN, MissReason.DEADLINE)).any())
        self._note_source(ask, is_failure=is_failure)
        self._fail(fetch.only(~arrived), reasons[~arrived])
        self._hand_on(fetch.only(arrived), checksums[arrived])
        self._operation.step_over(read)

    def _hand_on(self, fetch: _Fetch, checksums: npt.NDArray[np.uint64]) -> None:
        """Commit what has arrived, and copy it to where the operation wants it."""
        operation, pool = self._operation, self._operation.pool
        self._unload(fetch.source, len(fetch.rows))
        self._tier.instruments.note_read(fetch.source.name, len(fetch.rows), self._block_bytes)
        is_ours = ~fetch.is_shared
        known = fetch.only(fetch.is_shared)
        keys = operation.keys[known.rows]
        with self._shared.events.changing():
            stands = pool.index.commit(
                known.slots, known.generations, checksums[fetch.is_shared]
            )  # fmt: skip
            self._shared.note_stored(operation.namespace_id, TierKind.DRAM, keys[stands])
        # Dropped or evicted already, these are: what is in their slots may be another block.
        is_ours[fetch.is_shared] = pool.index.pin(known.slots, known.generations)
        operation.look_again(fetch.rows[~is_ours], np.zeros(int((~is_ours).sum()), np.uint8))
        fetch, checksums = fetch.only(is_ours), checksums[is_ours]
        found = Found(np.ones(len(fetch.rows), np.bool_), fetch.slots, fetch.generations, checksums)
        private = fetch.only(~fetch.is_shared)
        with operation.held_open() as is_open:
            if is_open and len(fetch.rows):
                operation.copy_out(
                    fetch.rows, found, TierKind.PEER,
                    lambda: pool.index.abort(private.slots, private.generations),
                )  # fmt: skip
                return
        pool.unpin(found)
        pool.index.abort(private.slots, private.generations)

    def _fail(
        self, fetch: _Fetch, reasons: npt.NDArray[np.uint8], *, may_retry: bool = False
    ) -> None:
        """Give slots back and have rows looked for elsewhere; reason 0 is none in particular."""
        if not len(fetch.rows):
            return
        self._operation.pool.index.abort(fetch.slots, fetch.generations)
        self._unload(fetch.source, len(fetch.rows))
        if not may_retry:
            self._tried[fetch.rows] |= self._bit(fetch.source)
            for reason in np.unique(reasons):
                self._tier.instruments.note_failed(
                    fetch.source.name,
                    MissReason(int(reason)) or MissReason.EVICTED,
                    int((reasons == reason).sum()),
                )
        self.is_late[fetch.rows] = reasons == MissReason.DEADLINE
        self._operation.look_again(fetch.rows, reasons)

    def _unload(self, source: Source, count: int) -> None:
        source.add_load(-count * self._block_bytes)
        self._tier.give_budget(count, self._block_bytes)

    def _note_source(self, ask: LeaseAsk, *, is_failure: bool) -> None:
        """Tell the peer's breaker; a caller in a hurry says nothing about the peer."""
        if not is_failure:
            ask.source.breaker.success()
        elif ask.is_patient or ask.code == Code.PEER_LOST:
            ask.source.breaker.failure()


def check_lease(
    lease: RemoteLease, keys: npt.NDArray[np.uint8], block_bytes: int
) -> npt.NDArray[np.uint64]:
    """Return the checksums of a lease that is on exactly these blocks.

    Raises:
        UsageError: It is on something else.
    """
    sizes = lease.blocks[:, 2] * lease.blocks[:, 3]
    is_right = len(lease) == len(keys) and bool((sizes == block_bytes).all())
    if not is_right or lease.keys is None or not np.array_equal(lease.keys, keys):
        raise UsageError(f"{lease.agent} leased other blocks than it was asked for")
    if lease.checksums is None:
        raise UsageError(f"{lease.agent} leased blocks without their checksums")
    return lease.checksums

"""Small faults by the thousand: transfers are cancelled, run out of time, lose lease or connection.

Blocks are used in turn. What a transfer has written is filled with a guard when it has quiesced,
and looked at when its turn comes again: whatever came late is found then.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable

from kvx.errors import TransferError
from tests.transfer.faults.ground import GRACE_S, PROBED, Ground, Running
from tests.transfer.faults.trial import Trial
from tests.transfer.faults.victim import NUM_BLOCKS
from tests.waiting import eventually

# Blocks before this are read, from here on they are written.
_HALF = NUM_BLOCKS // 2
# How a transfer may end when it was struck; it may always have been done before.
_ENDS = {
    "cancelled": "TransferCancelled",
    "short deadline": "TransferTimeout",
    "lease revoked": "StaleReference",
    "lease expires": "StaleReference",
    "let go of": "done",
    "connection dropped": "PeerLost",
    "deregistered here": "TransferTimeout",
}
_COUNTS = (1, 2, 8, 32, 96)
# From no time at all to what a large transfer takes.
_PAUSES_S = (0.0, 0.0, 0.0002, 0.001, 0.004)


class Storm:
    """Injects faults into transfers of one ground, one after the other or several at once."""

    def __init__(self, ground: Ground, rng: random.Random) -> None:
        """Guard everything."""
        self._ground = ground
        self._rng = rng
        self._turns = {False: 0, True: _HALF}
        self._late: dict[int, int] = {}
        ground.guard()
        ground.victim.ask("guard", _HALF, PROBED - _HALF)
        self._kinds: tuple[tuple[int, str, Callable[[], list[Running]]], ...] = (
            (34, "cancelled", self._cancel),
            (30, "short deadline", self._run_out),
            (12, "lease revoked", self._revoke),
            (8, "lease expires", self._expire),
            (6, "let go of", self._let_go),
            (4, "connection dropped", self._drop),
            (6, "deregistered here", self._deregister_here),
        )

    def inject(self) -> list[Trial]:
        """Let one fault happen, and see how everything that was under way has ended."""
        weights = [weight for weight, _, _ in self._kinds]
        _, name, act = self._rng.choices(self._kinds, weights)[0]
        running = act()
        state = "batch" if len(running) > 1 else "write" if running[0].is_write else "read"
        return [self._settle(one, name, state) for one in running]

    def finish(self) -> int:
        """Return how many guarded blocks were written after all."""
        time.sleep(0.05)
        reads = self._ground.touched(0, _HALF)
        return reads + int(self._ground.victim.ask("touched", _HALF, PROBED - _HALF))

    def _settle(self, running: Running, name: str, state: str) -> Trial:
        ground = self._ground
        ground.end(running)
        assert running.outcome in ("done", _ENDS[name]), f"{name}: {running.error!r}"
        is_stuck = ground.is_stuck(running)
        if running.is_write:
            wrong = ground.victim.ask("settle", running.first, running.count, running.arrived())
        else:
            wrong = ground.wrong(running)
            ground.guard(running.first, running.count)
        return Trial(
            ground.way.name, name, state, running.outcome, running.ended - running.deadline,
            late_writes=self._late.pop(id(running), 0), wrong_blocks=wrong, is_stuck=is_stuck,
        )  # fmt: skip

    def _begin(
        self, deadline_s: float = GRACE_S, token: bytes | None = None, count: int = 0, *,
        is_watched: bool = True,
    ) -> Running:  # fmt: skip
        """Begin with the blocks whose turn it is, after a look at their guard."""
        is_write = self._rng.random() < 0.5
        count = count or self._rng.choice(_COUNTS)
        begin, end = (_HALF, PROBED) if is_write else (0, _HALF)
        first = self._turns[is_write]
        if first + count > end:
            first = begin
        self._turns[is_write] = first + count
        ask = self._ground.victim.ask
        late = ask("touched", first, count) if is_write else self._ground.touched(first, count)
        running = self._ground.begin(
            is_write=is_write,
            deadline_s=deadline_s,
            first=first,
            count=count,
            token=token,
            is_watched=is_watched,
        )
        self._late[id(running)] = int(late)
        return running

    def _pause(self) -> None:
        time.sleep(self._rng.choice(_PAUSES_S) * self._rng.random())

    def _several(self, **terms: object) -> list[Running]:
        many = self._rng.random() < 0.2
        return [self._begin(count=1, **terms) for _ in range(6)] if many else [self._begin(**terms)]  # type: ignore[arg-type]

    def _cancel(self) -> list[Running]:
        running = self._several()
        for one in running:
            self._pause()
            if one.transfer is not None:
                one.transfer.cancel()
        return running

    def _run_out(self) -> list[Running]:
        return self._several(deadline_s=self._rng.choice((2e-5, 2e-4, 1e-3, 3e-3)))

    def _let_go(self) -> list[Running]:
        """Nobody holds or watches the transfer; it goes on, and hurts no other one."""
        forgotten = self._begin(deadline_s=0.5, is_watched=False)
        transfer, forgotten.transfer = forgotten.transfer, None
        if transfer is not None:
            job = transfer._drive.job
            del transfer
            assert job.wait_quiesced(GRACE_S), "it was let go of, and never ended"
            forgotten.error = None if job.state() == "done" else TransferError(job.state())
            forgotten.ended = time.monotonic()
            forgotten.over.set()
        return [forgotten, self._begin(count=1)]

    def _revoke(self) -> list[Running]:
        lease, token = self._ground.victim.ask("hand_out", 60.0)
        running = self._several(token=token)
        self._pause()
        self._ground.victim.ask("revoke", lease, GRACE_S)
        return running

    def _expire(self) -> list[Running]:
        lease, token = self._ground.victim.ask("hand_out", self._rng.uniform(0.0005, 0.004))
        running = self._several(token=token)
        for one in running:
            self._ground.end(one)
        self._ground.victim.ask("revoke", lease, GRACE_S)
        return running

    def _drop(self) -> list[Running]:
        running = self._several()
        self._pause()
        self._ground.victim.ask("drop_peers")
        for one in running:
            self._ground.end(one)
        self._ground.agent.connect(self._ground.peer.name, 20.0)
        # It seems up as well while the end of its last connection has not been seen yet.
        assert eventually(lambda: not self._ground.objection(), GRACE_S), "it does not come back"
        return running

    def _deregister_here(self) -> list[Running]:
        """The initiator's own memory goes: deregistering waits until nothing moves any more."""
        ground = self._ground
        running = self._several(deadline_s=self._rng.uniform(0.001, 0.05))
        self._pause()
        ground.registration.close(GRACE_S)
        moving = [one.transfer for one in running if one.transfer is not None]
        assert all(one.wait_quiesced(0.0) for one in moving), "it moves without memory"
        for one in running:
            ground.end(one)
        ground.register()
        ground.move_one()
        return running


def storm(ground: Ground, faults: int, rng: random.Random) -> list[Trial]:
    """Inject faults into a ground, whose victim has its first pattern again afterwards."""
    made = Storm(ground, rng)
    trials: list[Trial] = []
    rounds = 0
    while rounds < faults:
        if rounds == faults // 4:
            ground.mark_memory()
        ground.has_thread = rng.random() < 0.5
        trials += made.inject()
        rounds += 1
    late = made.finish()
    assert not late, f"{late} blocks were written after everything had quiesced"
    ground.victim.ask("fill", 1)
    return trials

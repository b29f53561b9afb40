"""What happens to whole processes: killed, frozen, restarted, or their memory taken away."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import kvx
from kvx.errors import KvxError
from kvx.transfer.agents.peer_state import PeerState
from tests.transfer.faults.ground import GRACE_S, Ground, Running
from tests.transfer.faults.trial import Trial
from tests.transfer.faults.victim import BLOCK_BYTES, KEY, NUM_BLOCKS, start_victim

STATES = ("idle", "connecting", "read", "write", "batch", "closing")


@dataclass(frozen=True, slots=True)
class Fault:
    """Something that happens to the victim.

    Attributes:
        name: Of the row in the table.
        strike: Does it.
        mend: Undoes it, so that the victim can be asked again.
        peer: States of the peer that may be reported after it; empty: nothing is said of it.
        is_fatal: Whether the victim is gone afterwards.
        goes_on: Whether the victim, once mended, goes on with what it was doing.
        lead_s: How long it takes until it is done, when that is longer than a transfer.
    """

    name: str
    strike: Callable[[Ground], None]
    mend: Callable[[Ground], None]
    peer: tuple[PeerState, ...] = ()
    is_fatal: bool = False
    goes_on: bool = False
    lead_s: float = 0.0


def _kill(ground: Ground) -> None:
    ground.victim.kill()


def _freeze(ground: Ground) -> None:
    ground.victim.freeze()


def _thaw(ground: Ground) -> None:
    ground.victim.thaw()


def _restart(ground: Ground) -> None:
    ground.victim.kill()
    ground.victim.close()
    ground.victim = start_victim(ground.way)
    # By the initiator alone, which may still believe in the old one.
    ground.agent.import_peer(ground.victim.ask("card"))


def _deregister(ground: Ground) -> None:
    took_s = ground.victim.ask("deregister", GRACE_S)
    assert took_s < GRACE_S, f"deregistering took {took_s:.1f} s"


def _free(ground: Ground) -> None:
    ground.victim.ask("free", GRACE_S)


def _register_again(ground: Ground) -> None:
    ground.victim.ask("register_again")
    ground.renew()
    ground.begin_anew()


def _rejoin(ground: Ground) -> None:
    ground.join()


def _nothing(ground: Ground) -> None:
    pass


FAULTS = (
    Fault("killed", _kill, _nothing, (PeerState.LOST,), is_fatal=True),
    Fault("frozen", _freeze, _thaw, (PeerState.FROZEN,), goes_on=True),
    Fault("restarted", _restart, _rejoin, (PeerState.FENCED, PeerState.LOST)),
    Fault("deregisters", _deregister, _register_again, (PeerState.UP,)),
    Fault("frees memory", _free, _register_again, (PeerState.UP,)),
)


def run(ground: Ground, fault: Fault, state: str, rng: random.Random) -> list[Trial]:
    """Let a fault happen once while a state lasts, and see what comes of it.

    Afterwards the ground has a victim that is well.
    """
    if state == "closing":
        trials = [_strike_closing(ground, fault, rng)]
    elif state == "connecting":
        trials = [_strike_connecting(ground, fault, rng)]
    else:
        trials = _strike_transfers(ground, fault, state, rng)
    return trials


def _work(ground: Ground, state: str, rng: random.Random) -> Iterator[Running]:
    """Yield transfers as they are begun."""
    deadline_s = rng.uniform(0.1, 0.3)
    if state == "batch":
        for place in range(24):
            yield ground.begin(
                is_write=bool(place % 3 == 2), first=place, count=1, deadline_s=deadline_s
            )
    elif state != "idle":
        yield ground.begin(is_write=state == "write", deadline_s=deadline_s)


def _strike_transfers(ground: Ground, fault: Fault, state: str, rng: random.Random) -> list[Trial]:
    running: list[Running] = []
    striker = threading.Thread(target=fault.strike, args=(ground,), daemon=True)
    if state == "batch":
        place = rng.randrange(24)
        for number, one in enumerate(_work(ground, state, rng)):
            running.append(one)
            if number == place:
                striker.start()
    elif fault.lead_s:
        striker.start()
        time.sleep(rng.uniform(0.0, fault.lead_s))
        running += _work(ground, state, rng)
    else:
        running += _work(ground, state, rng)
        time.sleep(rng.uniform(0.0, 0.9) * ground.usual_s[state == "write"])
        striker.start()
    striker.join(GRACE_S * 3)
    assert not striker.is_alive(), f"{fault.name} did not come to an end"
    if state == "idle":
        running.append(ground.begin(is_write=rng.random() < 0.5, deadline_s=rng.uniform(0.1, 0.3)))
    for one in running:
        ground.end(one)
    return _conclude(ground, fault, state, running)


def _conclude(ground: Ground, fault: Fault, state: str, running: list[Running]) -> list[Trial]:
    """See what was done, mend what was broken, and look for late writes."""
    reads = [one for one in running if not one.is_write]
    # Caught, but sent: what the memory was used for once it was let go of.
    assert not any(one.outcome == "CorruptBlock" for one in running), "it was read too late"
    # Before anything of the memory is used for something else.
    wrong = {id(one): ground.wrong(one) for one in reads}
    said = ground.await_peer(*fault.peer) if fault.peer else ""
    assert not fault.peer or said in fault.peer, f"{fault.name}, and the peer is {said}"
    quiet = [one for one in reads if one.transfer is None or one.transfer.wait_quiesced(1.0)]
    has_guard = len(quiet) == len(reads)
    if has_guard:
        ground.guard()
    if fault.is_fatal:
        ground.discard()
    else:
        fault.mend(ground)
    stuck = {id(one): ground.is_stuck(one) for one in running}
    if fault.goes_on:
        wrong |= {id(one): ground.wrong(one) for one in running if one.is_write}
    # Whoever was frozen has had its turn when it has answered this.
    touched = 0
    if has_guard and fault.goes_on:
        ground.victim.ask("guard")
        time.sleep(0.03)
        touched = ground.touched() + ground.victim.ask("touched")
        ground.victim.ask("fill", 1)
    elif has_guard and fault.is_fatal:
        time.sleep(0.01)
        touched = ground.touched()
    if fault.is_fatal:
        ground.raise_victim()
    return [
        Trial(
            ground.way.name, fault.name, state, one.outcome, one.ended - one.deadline,
            late_writes=touched if place == 0 else 0, wrong_blocks=wrong.get(id(one), 0),
            peer=said, is_stuck=stuck[id(one)],
        )
        for place, one in enumerate(running)
    ]  # fmt: skip


def _strike_connecting(ground: Ground, fault: Fault, rng: random.Random) -> Trial:
    card = ground.victim.ask("card")
    ground.peer.close()
    ground.await_peer(PeerState.LOST)
    timeout_s, errors, overs = rng.uniform(0.1, 0.3), [], []

    def connect() -> None:
        # Not before: a victim that is restarted first takes its time.
        deadline = time.monotonic() + timeout_s
        try:
            ground.agent.connect(card, timeout_s)
        except KvxError as error:
            errors.append(type(error).__name__)
        overs.append(time.monotonic() - deadline)

    connecting = threading.Thread(target=connect, daemon=True)
    delay_s = rng.uniform(-0.005, 0.015)
    if delay_s > 0:
        connecting.start()
        time.sleep(delay_s)
        fault.strike(ground)
    else:
        fault.strike(ground)
        connecting.start()
    connecting.join(timeout_s + GRACE_S)
    assert overs, "connecting never ended"
    if fault.is_fatal:
        ground.discard()
        ground.raise_victim()
    else:
        fault.mend(ground)
        ground.join()
    outcome = errors[0] if errors else "done"
    return Trial(ground.way.name, fault.name, "connecting", outcome, overs[0])


def _strike_closing(ground: Ground, fault: Fault, rng: random.Random) -> Trial:
    with kvx.Agent("closer", key=KEY, config=ground.way.config) as closer:
        memory = kvx.MemoryRegion(NUM_BLOCKS * BLOCK_BYTES, is_shared=ground.way.is_shared)
        taken = memory if ground.way.is_shared else memory.array()
        registration = closer.register(taken)
        peer = closer.connect(ground.victim.ask("card"), 20.0)
        everything = ([0], [NUM_BLOCKS * BLOCK_BYTES])
        transfer = closer.read(
            registration.descriptors(*everything),
            peer.descriptors(*everything, lease=ground.token), deadline_s=GRACE_S,
            backend=ground.way.backend,
        )  # fmt: skip
        striker = threading.Thread(target=fault.strike, args=(ground,), daemon=True)
        timeout_s = rng.uniform(0.1, 0.3)
        striker.start()
        time.sleep(rng.uniform(0.0, 0.005))
        deadline = time.monotonic() + timeout_s
        report = closer.close(timeout_s)
        over_s = time.monotonic() - deadline
    striker.join(GRACE_S * 3)
    assert transfer.poll() is not kvx.TransferState.PENDING, "it outlived its agent"
    assert not report.abandoned_transfers, f"something was abandoned: {report}"
    outcome = "done" if transfer.error is None else type(transfer.error).__name__
    if fault.is_fatal:
        ground.discard()
        ground.raise_victim()
    else:
        fault.mend(ground)
    return Trial(ground.way.name, fault.name, "closing", outcome, over_s)

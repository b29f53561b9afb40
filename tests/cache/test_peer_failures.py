"""Peers that die, freeze, lie, forget, come back, or close: never wrong bytes, never late."""

from __future__ import annotations

import dataclasses
import signal
import time
from pathlib import Path

import numpy as np
import pytest

import kvx
from kvx.cache.peer.fetching import check_lease
from kvx.cache.peer.messages import Ask
from kvx.transfer.agents.lease_token import RemoteLease
from kvx.transfer.core import LeaseRef
from tests.cache.conftest import make_blocks, make_hashes, open_space
from tests.cache.peer_pair import bring, check, held, metric, pair, tier_of
from tests.cache.peer_process import BLOCK_BYTES, PeerProcess, Plan
from tests.waiting import eventually

pytestmark = pytest.mark.usefixtures("runtime_directory")


def test_a_damaged_block_is_corrupt_and_never_served() -> None:
    with pair() as (a, cache, space):
        a.ask("store", 0, 8)
        assert eventually(lambda: held(space, 8) == 8)
        a.ask("damage", 3)
        result = bring(space, 8)
        assert result.reasons.tolist() == [0, 0, 0, kvx.MissReason.CORRUPT, 0, 0, 0, 0]
        text = cache.metrics.render()
        assert metric(text, 'kvx_peer_failures_total{peer="a",reason="corrupt"}') == 1
        # The owner looked for itself and let it go, so nobody is served it again.
        assert eventually(lambda: a.ask("held", 0, 8) == 3)
        assert held(space, 8) == 3


def test_a_peers_word_that_a_block_is_damaged_is_not_enough() -> None:
    with pair() as (a, cache, space):
        a.ask("store", 0, 4)
        assert eventually(lambda: held(space, 4) == 4)
        tier = tier_of(cache)
        keys = space.namespace.keys(make_hashes(4))
        ask = tier.new_ask(tier.sources[0], 4, 1.0)
        tier.send(ask, keys, BLOCK_BYTES)
        assert ask.wait(1.0)
        assert ask.grant is not None
        tier.release(ask, 0, keys)
        assert eventually(lambda: a.ask("lent_bytes") == 0)
        assert a.ask("held", 0, 4) == 4


def test_what_is_gone_is_named_and_not_asked_for_again() -> None:
    with pair() as (a, cache, space):
        a.ask("store", 0, 8)
        assert eventually(lambda: held(space, 8) == 8)
        # The news of the drop does not come through.
        tier_of(cache)._talk._learn = lambda *_: None  # type: ignore[method-assign]
        a.ask("drop", 2, 2)
        assert held(space, 8) == 8
        result = bring(space, 8)
        assert result.num_blocks == 6
        assert (result.reasons[2:4] == kvx.MissReason.NEVER_STORED).all()
        assert held(space, 8) == 2


def test_a_stopped_peer_costs_its_deadline_and_the_rest_is_served() -> None:
    with pair(reader=Plan("b", settings={"deadline_s": 0.2})) as (a, _, space):
        a.ask("store", 0, 8)
        space.offload(make_hashes(4, first=8), make_blocks(4, first=8)).wait()
        assert eventually(lambda: held(space, 12) == 12)
        a.signal(signal.SIGSTOP)
        began = time.monotonic()
        result = bring(space, 12)
        assert time.monotonic() - began < 2.0
        assert (result.reasons[:8] == kvx.MissReason.DEADLINE).all()
        assert result.num_blocks == 4
        # Soon it is known to be frozen, and does not count any more.
        assert eventually(lambda: held(space, 12) == 0)
        assert space.match(make_hashes(1)).reason is kvx.MissReason.TIER_DOWN
        a.signal(signal.SIGCONT)
        assert eventually(lambda: held(space, 12) == 12)
        assert eventually(lambda: bring(space, 12).num_blocks == 12)


def test_a_transfer_in_a_hurry_ends_by_its_own_deadline() -> None:
    with pair() as (a, _, space):
        a.ask("store", 0, 8)
        assert eventually(lambda: held(space, 8) == 8)
        a.signal(signal.SIGSTOP)
        target = np.zeros((8, BLOCK_BYTES), np.uint8)
        began = time.monotonic()
        transfer = space.onboard(make_hashes(8), target, deadline_s=0.1)
        with pytest.raises(kvx.TransferTimeout):
            transfer.wait()
        assert time.monotonic() - began < 1.0
        assert transfer.result is not None
        assert (transfer.result.reasons == kvx.MissReason.DEADLINE).all()
        a.signal(signal.SIGCONT)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
@pytest.mark.parametrize("way", ["unix", "tcp"])
def test_a_peer_that_dies_midway_leaves_misses(way: str, number: int) -> None:
    settings = {"deadline_s": 0.3, "max_in_flight_bytes": 4 * BLOCK_BYTES}
    with pair(reader=Plan("b", settings=settings), way=way) as (a, cache, space):
        a.ask("store", 0, 100)
        assert eventually(lambda: held(space, 100) == 100)
        target = np.zeros((100, BLOCK_BYTES), np.uint8)
        transfer = space.onboard(make_hashes(100), target, deadline_s=5.0)
        time.sleep(0.02)
        a.signal(number)
        result = transfer.wait(8.0)
        check(result, target)
        missed = set(result.reasons[result.reasons != kvx.MissReason.HIT].tolist())
        assert missed <= {kvx.MissReason.TIER_DOWN, kvx.MissReason.DEADLINE}
        assert eventually(lambda: tier_of(cache).in_flight_bytes == 0)
        cache.check_integrity()


def test_another_peer_takes_over() -> None:
    settings = {"deadline_s": 0.2}
    with PeerProcess(Plan("a")) as a, PeerProcess(Plan("c")) as c:
        plan = Plan("b", peers=(a.unix, c.unix), settings=settings)
        with plan.opened() as cache:
            space = open_space(cache)
            a.ask("store", 0, 32)
            c.ask("store", 0, 24)
            sources = tier_of(cache)
            assert eventually(lambda: sources.known_blocks == 56)
            a.signal(signal.SIGSTOP)
            result = bring(space, 32)
            assert result.num_blocks == 24
            assert (result.reasons[24:] == kvx.MissReason.DEADLINE).all()
            text = cache.metrics.render()
            assert metric(text, 'kvx_peer_read_blocks_total{peer="c"}') == 24
            assert metric(text, 'kvx_peer_failures_total{peer="a",reason="deadline"}') >= 8


def test_a_restarted_peer_joins_again_with_what_its_disk_holds(tmp_path: Path) -> None:
    socket = tmp_path / "a.sock"
    owner = Plan("a", nvme=tmp_path / "a", listen=(f"unix:{socket}",))
    with PeerProcess(owner) as a:
        a.ask("store", 0, 16)
        assert a.ask("flush")
        with Plan("b", peers=(f"unix:{socket}",)).opened() as cache:
            space = open_space(cache)
            assert eventually(lambda: held(space, 16) == 16)
            a.kill()
            assert eventually(lambda: held(space, 16) == 0)
            assert space.match(make_hashes(1)).reason is kvx.MissReason.TIER_DOWN
            with PeerProcess(owner):
                assert eventually(lambda: held(space, 16) == 16)
                result = bring(space, 16)
                assert result.num_blocks == 16
                assert (result.tiers == kvx.TierKind.PEER).all()


def test_missed_changes_are_noticed_and_all_is_asked_for_anew() -> None:
    with pair() as (a, cache, space):
        a.ask("store", 0, 8)
        assert eventually(lambda: held(space, 8) == 8)
        talk = tier_of(cache)._talk
        learn, dropped = talk._learn, []
        talk._learn = lambda *what: dropped.append(what)  # type: ignore[method-assign]
        a.ask("drop", 0, 4)
        assert eventually(lambda: dropped)
        talk._learn = learn  # type: ignore[method-assign]
        assert held(space, 8) == 8  # wrong, for now
        a.ask("store", 8, 4)
        assert eventually(lambda: held(space, 8, first=4) == 8)
        assert held(space, 4) == 0
        assert metric(cache.metrics.render(), 'kvx_peer_resyncs_total{peer="a"}') == 1


def test_closing_does_not_wait_for_a_peer_that_holds_a_lease() -> None:
    with pair() as (a, cache, space):
        a.ask("store", 0, 8)
        assert eventually(lambda: held(space, 8) == 8)
        tier = tier_of(cache)
        ask = tier.new_ask(tier.sources[0], 8, 30.0)
        tier.send(ask, space.namespace.keys(make_hashes(8)), BLOCK_BYTES)
        assert ask.wait(2.0)
        assert a.ask("pinned") == 8
        began = time.monotonic()
        a.ask("close")
        assert time.monotonic() - began < 3.0


def test_a_lease_that_nobody_gives_back_ends_by_itself() -> None:
    with pair(reader=Plan("b", settings={"deadline_s": 0.1})) as (a, cache, space):
        a.ask("store", 0, 8)
        assert eventually(lambda: held(space, 8) == 8)
        tier = tier_of(cache)
        ask = tier.new_ask(tier.sources[0], 8, 30.0)
        tier.send(ask, space.namespace.keys(make_hashes(8)), BLOCK_BYTES)
        assert ask.wait(2.0)
        assert a.ask("pinned") == 8
        assert eventually(lambda: a.ask("pinned") == 0, 5.0)
        assert a.ask("lent_bytes") == 0


def test_a_lease_on_other_blocks_is_not_read() -> None:
    keys = np.arange(64, dtype=np.uint8).reshape(4, 16)
    rows = np.array([[0, 4096, 1, 4096], [4096, 4096, 1, 4096]] * 2)
    lease = RemoteLease(
        "a", 1, LeaseRef(1, 0, 1), 1, 1 << 20, kvx.Rights.READ, 1.0, "b", rows,
        np.arange(4, dtype=np.uint64), keys,
    )  # fmt: skip
    assert check_lease(lease, keys, 4096).tolist() == [0, 1, 2, 3]
    for wrong, size in ((keys[::-1], 4096), (keys[:3], 4096), (keys, 8192)):
        with pytest.raises(kvx.UsageError, match="other blocks"):
            check_lease(lease, wrong, size)
    with pytest.raises(kvx.UsageError, match="other blocks"):
        check_lease(dataclasses.replace(lease, keys=None), keys, 4096)
    with pytest.raises(kvx.UsageError, match="without their checksums"):
        check_lease(dataclasses.replace(lease, checksums=None), keys, 4096)


def test_an_owner_that_lends_other_blocks_is_found_out() -> None:
    """Even with a right signature: the keys in the lease have to be those that were asked for."""
    tiers = [{"kind": "dram", "capacity": "2MiB"}, {"kind": "peer", "publish_s": 0.005}]
    with (
        kvx.Agent("a") as one,
        kvx.Agent("b") as other,
        kvx.TieredCache.open({"tiers": tiers}, agent=one) as liar,
        kvx.TieredCache.open({"tiers": tiers}, agent=other) as cache,
    ):
        other.connect(one.addresses[0])
        space = open_space(cache)
        open_space(liar).offload(make_hashes(8), make_blocks(8)).wait()
        assert eventually(lambda: held(space, 8) == 8)
        granting = tier_of(liar)._talk._granting
        assert granting is not None
        asked = granting.asked

        def swap(peer: str, ask: Ask) -> None:
            keys = b"".join(ask.keys[at : at + 16] for at in range(len(ask.keys) - 16, -1, -16))
            asked(peer, Ask(ask.number, ask.block_bytes, ask.remaining_s, keys))

        granting.asked = swap  # type: ignore[method-assign]
        result = bring(space, 8)
        assert result.num_blocks == 0
        assert (result.reasons == kvx.MissReason.TIER_DOWN).all()

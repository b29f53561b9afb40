"""Caches that read from each other: real processes, each with DRAM and NVMe of its own."""

from __future__ import annotations

import contextlib
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

import kvx
from kvx.cache.peer.tier import PeerTier
from tests.cache.conftest import make_blocks, make_hashes, open_space
from tests.cache.peer_process import BLOCK_BYTES, PeerProcess, Plan

LOCAL = "tcp://127.0.0.1:0"


@pytest.fixture(autouse=True, scope="module")
def _runtime_directory(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Keep socket files apart; processes that are spawned inherit it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_RUNTIME_DIR", str(tmp_path_factory.mktemp("run")))
        yield


def eventually(condition: Callable[[], object], timeout_s: float = 10.0) -> bool:
    end = time.monotonic() + timeout_s
    while time.monotonic() < end:
        if condition():
            return True
        time.sleep(0.01)
    return bool(condition())


def held(space: kvx.CacheSpace, count: int, *, first: int = 0) -> int:
    return space.match(make_hashes(count, first=first)).num_blocks


def bring(
    space: kvx.CacheSpace, count: int, *, first: int = 0, deadline_s: float = 10.0
) -> kvx.TransferResult:
    """Onboard blocks; none that counts as arrived may have wrong bytes."""
    target = np.zeros((count, BLOCK_BYTES), np.uint8)
    result = space.onboard(make_hashes(count, first=first), target, deadline_s=deadline_s).wait()
    check(result, target, first)
    return result


def check(result: kvx.TransferResult, target: npt.NDArray[np.uint8], first: int = 0) -> None:
    arrived = result.reasons == kvx.MissReason.HIT
    assert (target[arrived] == make_blocks(len(target), first=first)[arrived]).all()


def tier_of(cache: kvx.TieredCache) -> PeerTier:
    tier = cache._shared.peers
    assert tier is not None
    return tier


def metric(cache_text: str, line: str) -> float:
    found = [one for one in cache_text.splitlines() if one.startswith(line + " ")]
    return float(found[0].rpartition(" ")[2]) if found else 0.0


@contextlib.contextmanager
def pair(
    owner: Plan | None = None, reader: Plan | None = None, *, way: str = "unix"
) -> Iterator[tuple[PeerProcess, kvx.TieredCache, kvx.CacheSpace]]:
    """Start a cache in another process, and one here that reads from it."""
    with PeerProcess(owner or Plan("a", listen=(LOCAL,))) as a:
        plan = reader or Plan("b")
        address = a.unix if way == "unix" else a.tcp
        with Plan(**{**vars(plan), "peers": (address,)}).opened() as cache:
            yield a, cache, open_space(cache)


@pytest.mark.parametrize("way", ["unix", "tcp"])
def test_a_block_of_a_peer_is_served_and_warms_dram(way: str) -> None:
    with pair(way=way) as (a, cache, space):
        assert a.ask("store", 0, 32) == 32
        assert eventually(lambda: held(space, 32) == 32)
        match = space.match(make_hashes(40))
        assert match.num_blocks == 32
        assert match.blocks_in(kvx.TierKind.PEER) == 32
        result = bring(space, 40)
        assert result.num_blocks == 32
        assert (result.tiers[:32] == kvx.TierKind.PEER).all()
        assert (result.reasons[32:] == kvx.MissReason.NEVER_STORED).all()
        assert result.bytes_done == 32 * BLOCK_BYTES
        # From now on they are here.
        assert (bring(space, 32).tiers == kvx.TierKind.DRAM).all()
        # Nothing stays lent or pinned, on either side.
        assert eventually(lambda: a.ask("lent_bytes") == 0 and a.ask("pinned") == 0)
        assert tier_of(cache).in_flight_bytes == 0
        text = cache.metrics.render()
        assert metric(text, 'kvx_peer_read_blocks_total{peer="a"}') == 32
        assert metric(text, 'kvx_peer_read_bytes_total{peer="a"}') == 32 * BLOCK_BYTES
        assert metric(text, "kvx_peer_known_blocks") == 32
        assert metric(text, 'kvx_blocks_total{verb="onboard",tier="peer"}') == 32
        theirs = str(a.ask("metrics"))
        assert metric(theirs, 'kvx_peer_served_blocks_total{peer="b"}') == 32
        cache.check_integrity()
        a.ask("check")


def test_both_serve_each_other() -> None:
    with pair() as (a, _, space):
        assert eventually(lambda: a.ask("listeners") == 1)
        space.offload(make_hashes(8, first=100), make_blocks(8, first=100)).wait()
        assert eventually(lambda: a.ask("held", 100, 8) == 8)
        assert a.ask("onboard", 100, 8) == ([0] * 8, 0)


def test_a_prefetch_brings_blocks_into_dram() -> None:
    with pair() as (a, _, space):
        a.ask("store", 0, 16)
        assert eventually(lambda: held(space, 16) == 16)
        result = space.prefetch(make_hashes(16)).wait()
        assert result.num_blocks == 16
        assert result.bytes_done == 16 * BLOCK_BYTES
        assert space.match(make_hashes(16)).blocks_in(kvx.TierKind.DRAM) == 16


def test_what_only_its_nvme_holds_is_brought_up(tmp_path: Path) -> None:
    with pair(Plan("a", nvme=tmp_path / "a")) as (a, _, space):
        a.ask("store", 0, 48)
        assert a.ask("flush")
        a.ask("forget_dram")
        assert eventually(lambda: held(space, 48) == 48)
        result = bring(space, 48)
        assert result.num_blocks == 48
        assert (result.tiers == kvx.TierKind.PEER).all()


def test_more_blocks_than_either_lends_or_takes_at_once(tmp_path: Path) -> None:
    owner = Plan("a", nvme=tmp_path / "a", dram_blocks=64)
    reader = Plan("b", dram_blocks=48, settings={"max_in_flight_bytes": 12 * BLOCK_BYTES})
    with pair(owner, reader) as (a, cache, space):
        a.ask("store", 0, 200)
        assert a.ask("flush")
        assert eventually(lambda: held(space, 200) == 200)
        assert bring(space, 200).num_blocks == 200
        assert tier_of(cache).in_flight_bytes == 0
        cache.check_integrity()


def test_blocks_keep_their_time_to_live() -> None:
    with pair() as (a, _, space):
        a.ask("store", 0, 4, 2)
        a.ask("store", 4, 4, 60)
        a.ask("store", 8, 4)
        assert eventually(lambda: held(space, 12) == 12)
        assert bring(space, 12).num_blocks == 12
        a.kill()
        assert eventually(lambda: held(space, 12) == 0)
        assert held(space, 8, first=4) == 8
        expiries_s = space.dram_pool.index.snapshot()["expiry_s"]
        assert sorted(set((expiries_s > 0).tolist())) == [False, True]


@pytest.mark.parametrize("facts", [{"tenant": "t"}, {"salt": "other"}, {"revision": "2"}])
def test_another_namespace_finds_nothing(facts: dict[str, str]) -> None:
    with pair() as (a, cache, space):
        a.ask("store", 0, 8)
        assert eventually(lambda: held(space, 8) == 8)
        other = open_space(cache, **facts)
        assert held(other, 8) == 0
        assert bring(other, 8).num_blocks == 0


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


def test_the_work_is_shared_out_among_peers() -> None:
    with (
        PeerProcess(Plan("a")) as a,
        PeerProcess(Plan("c")) as c,
        Plan("b", peers=(a.unix, c.unix)).opened() as cache,
    ):
        a.ask("store", 0, 32)
        c.ask("store", 0, 32)
        assert eventually(lambda: tier_of(cache).known_blocks == 64)
        assert bring(open_space(cache), 32).num_blocks == 32
        text = cache.metrics.render()
        assert metric(text, 'kvx_peer_read_blocks_total{peer="a"}') == 16
        assert metric(text, 'kvx_peer_read_blocks_total{peer="c"}') == 16


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


def test_who_does_not_serve_is_not_read_from() -> None:
    with pair(Plan("a", settings={"serve": False})) as (a, cache, space):
        a.ask("store", 0, 8)
        space.offload(make_hashes(8, first=8), make_blocks(8, first=8)).wait()
        assert eventually(lambda: a.ask("held", 8, 8) == 8)
        assert a.ask("onboard", 8, 8) == ([0] * 8, 0)
        assert held(space, 8) == 0
        tier = tier_of(cache)
        ask = tier.new_ask(tier.sources[0], 8, 1.0)
        tier.send(ask, space.namespace.keys(make_hashes(8)), BLOCK_BYTES)
        assert ask.wait(2.0)
        assert ask.grant is not None
        assert not ask.grant.token


def test_a_cache_that_is_cleared_or_closed_is_forgotten() -> None:
    with pair() as (a, cache, space):
        a.ask("store", 0, 8)
        assert eventually(lambda: held(space, 8) == 8)
        assert a.ask("clear") == 8
        assert eventually(lambda: tier_of(cache).known_blocks == 0)
        a.ask("store", 0, 8)
        assert eventually(lambda: held(space, 8) == 8)
        a.ask("close")
        assert eventually(lambda: tier_of(cache).known_blocks == 0)
        assert space.match(make_hashes(8)).num_blocks == 0


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


def test_a_cache_makes_an_agent_of_its_own(tmp_path: Path) -> None:
    shared = {"directory": str(tmp_path / "cards")}
    with (
        PeerProcess(Plan("a", is_own_agent=True, settings=shared)) as a,
        Plan("b", peers=("a",), is_own_agent=True, settings=shared).opened() as cache,
    ):
        space = open_space(cache)
        a.ask("store", 0, 8)
        assert eventually(lambda: held(space, 8) == 8)
        assert bring(space, 8).num_blocks == 8
        assert tier_of(cache).agent.name == "b"


def test_a_shared_agent_outlives_its_cache() -> None:
    with kvx.Agent("b") as agent:
        for _ in range(2):
            tiers = [{"kind": "dram", "capacity": "1MiB"}, {"kind": "peer"}]
            with kvx.TieredCache.open({"tiers": tiers}, agent=agent) as cache:
                space = open_space(cache)
                space.offload(make_hashes(4), make_blocks(4)).wait()
                assert bring(space, 4).num_blocks == 4
            assert agent.stats()["regions"] == 0
        assert agent.addresses


def test_agents_and_configurations_have_to_fit() -> None:
    dram = {"kind": "dram", "capacity": "1MiB"}
    with kvx.Agent("b") as agent:
        with pytest.raises(kvx.UsageError, match="no tier of kind peer"):
            kvx.TieredCache.open({"tiers": [dram]}, agent=agent)
        named = {"kind": "peer", "name": "c"}
        with pytest.raises(kvx.ConfigError, match="leave them out"):
            kvx.TieredCache.open({"tiers": [dram, named]}, agent=agent)
    wrong = {"kind": "peer", "peers": ["http://x"]}
    with pytest.raises(kvx.UsageError, match="http://x"):
        kvx.TieredCache.open({"tiers": [dram, wrong]})
    keyless = {"kind": "peer", "listen": "tcp://0.0.0.0:0"}
    with pytest.raises(kvx.UsageError, match="key"):
        kvx.TieredCache.open({"tiers": [dram, keyless]})

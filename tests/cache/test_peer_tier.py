"""Caches that read from each other: real processes, each with DRAM and NVMe of its own."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import kvx
from tests.cache.conftest import make_blocks, make_hashes, open_space
from tests.cache.peer_pair import bring, check, held, metric, pair, tier_of
from tests.cache.peer_process import BLOCK_BYTES, PeerProcess, Plan
from tests.waiting import eventually

pytestmark = pytest.mark.usefixtures("runtime_directory")


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


def test_transfers_of_the_same_blocks_do_not_wait_for_each_other() -> None:
    with pair() as (a, cache, space):
        a.ask("store", 0, 24)
        assert eventually(lambda: held(space, 24) == 24)
        targets = [np.zeros((24, BLOCK_BYTES), np.uint8) for _ in range(6)]
        transfers = [space.onboard(make_hashes(24), target) for target in targets]
        for transfer, target in zip(transfers, targets, strict=True):
            result = transfer.wait()
            check(result, target)
            assert result.num_blocks == 24
        stats = space.dram_pool.index.stats()
        assert (stats["committed"], stats["pinned"], stats["reserved"]) == (24, 0, 0)
        assert cache.stats()["peer"]["in_flight_bytes"] == 0


async def test_a_transfer_from_a_peer_can_be_awaited() -> None:
    with pair() as (a, _, space):
        a.ask("store", 0, 24)
        assert eventually(lambda: held(space, 24) == 24)
        target = np.zeros((24, BLOCK_BYTES), np.uint8)
        result = await space.onboard(make_hashes(24), target)
        check(result, target)
        assert result.num_blocks == 24


def test_a_cancelled_transfer_leaves_nothing_behind() -> None:
    settings = {"max_in_flight_bytes": 4 * BLOCK_BYTES}
    with pair(reader=Plan("b", settings=settings)) as (a, cache, space):
        a.ask("store", 0, 100)
        assert eventually(lambda: held(space, 100) == 100)
        target = np.zeros((100, BLOCK_BYTES), np.uint8)
        transfer = space.onboard(make_hashes(100), target)
        transfer.cancel()
        with pytest.raises(kvx.TransferCancelled):
            transfer.wait()
        assert transfer.wait_quiesced(2.0)
        assert eventually(lambda: tier_of(cache).in_flight_bytes == 0)
        assert eventually(lambda: a.ask("lent_bytes") == 0)
        assert eventually(lambda: space.dram_pool.index.stats()["reserved"] == 0)


def test_blocks_are_expected_at_a_peer_before_it_tells_of_them() -> None:
    with pair(Plan("a", settings={"publish_s": 60.0})) as (a, cache, space):
        assert eventually(lambda: a.ask("listeners") == 1)
        a.ask("store", 0, 8)
        space.expect_at("nobody", make_hashes(8))
        assert held(space, 8) == 0
        space.expect_at("a", make_hashes(10))
        assert eventually(lambda: held(space, 10) == 10)
        # Those that were expected in vain are a miss, and forgotten.
        assert bring(space, 10).num_blocks == 8
        assert held(space, 10) == 8
        assert cache.agent is tier_of(cache).agent
        assert cache.agent.key is not None


def test_a_cache_without_peers_expects_nothing() -> None:
    with kvx.TieredCache.open({"tiers": [{"kind": "dram", "capacity": "1MiB"}]}) as cache:
        assert cache.agent is None
        space = open_space(cache)
        space.expect_at("a", make_hashes(4))
        assert held(space, 4) == 0

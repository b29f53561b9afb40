"""KV events of kvx's tiers: through vLLM's publisher to a subscriber, and the reader alone."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import zmq
from vllm.distributed.kv_events import AllBlocksCleared, BlockRemoved, BlockStored, KVEventBatch
from vllm.v1.core.kv_cache_utils import BlockHash, maybe_convert_block_hash
from vllm.v1.kv_offload.base import make_offload_key

import kvx
from kvx_vllm import events as kvx_events
from kvx_vllm.events import Announcer, EventReader, TierChange
from kvx_vllm.rank_cache import RankCache
from tests.cache.faults import wait_until
from tests.connectors.vllm.below import Below, hashes_of, prompt_of, store
from tests.connectors.vllm.engine import BLOCK_TOKENS, answer, open_engine


class Subscriber:
    """Hears what the engine publishes, in order."""

    def __init__(self, endpoint: str) -> None:
        self.events: list[BlockStored | BlockRemoved | AllBlocksCleared] = []
        self._decoder = msgspec.msgpack.Decoder(KVEventBatch)
        self._socket = zmq.Context.instance().socket(zmq.SUB)
        self._socket.connect(endpoint)
        self._socket.setsockopt(zmq.SUBSCRIBE, b"")

    def hear(self, wanted: Callable[[], bool]) -> None:
        """Take events until something holds."""

        def is_there() -> bool:
            while self._socket.poll(20):
                self.events += self._decoder.decode(self._socket.recv_multipart()[2]).events
            return wanted()

        wait_until(is_there, 20.0)

    def holds(self, medium: str, ownership: str | None, hashes: list[bytes]) -> list[bool]:
        """Return which blocks a tier holds, to all that was heard."""
        held = set()
        for event in self.events:
            if isinstance(event, AllBlocksCleared):
                continue  # vLLM's word for its own blocks: `settle` makes it say that
            if (event.medium, event.ownership) == (medium, ownership):
                assert event.locality == (None if medium == "GPU" else "LOCAL")
                if isinstance(event, BlockStored):
                    held.update(event.block_hashes)
                else:
                    held.difference_update(event.block_hashes)
        return [named(one) in held for one in hashes]

    def close(self) -> None:
        self._socket.close(linger=0)


def named(block_hash: bytes) -> object:
    """Return what vLLM publishes for a hash."""
    return maybe_convert_block_hash(BlockHash(block_hash))


@pytest.fixture(scope="module")
def engine(
    tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Below, Subscriber]]:
    endpoint = f"ipc://{tmp_path_factory.mktemp('zmq')}/events"
    tiers = [
        {"kind": "dram", "capacity": "8MiB"},
        {"kind": "nvme", "path": str(tmp_path_factory.mktemp("nvme")), "capacity": "64MiB"},
    ]
    published = {"enable_kv_cache_events": True, "publisher": "zmq", "endpoint": endpoint}
    with open_engine(
        tiny_llama,
        {"tiers": tiers},
        extra={"self_describing_kv_events": True},
        kv_events_config=published,
    ) as llm:
        subscriber = Subscriber(endpoint)
        # Whoever subscribes late has missed what was published before.
        number = iter(range(1000))

        def is_heard() -> bool:
            answer(llm, prompt_of(f"anybody there? {next(number)}", 64), max_tokens=1)
            return bool(subscriber.events)

        subscriber.hear(is_heard)
        yield Below.of(llm), subscriber
        subscriber.close()


def step(below: Below) -> None:
    """Let the engine do something: what happened meanwhile is told with it."""
    answer(below.llm, prompt_of("a step", 20), max_tokens=2)


def test_blocks_are_announced_where_they_come_and_withdrawn_where_they_leave(
    engine: tuple[Below, Subscriber],
) -> None:
    below, heard = engine
    prompt = prompt_of("events")
    hashes = hashes_of(below.llm, prompt)
    everywhere, nowhere = [True] * len(hashes), [False] * len(hashes)
    assert heard.holds("CPU", None, hashes) == nowhere
    store(below.llm, prompt)
    step(below)
    heard.hear(lambda: heard.holds("CPU", None, hashes) == everywhere)
    assert below.rank.cache.flush(10.0)
    step(below)
    heard.hear(lambda: heard.holds("STORAGE", "nvme", hashes) == everywhere)

    below.push_down()
    step(below)
    heard.hear(lambda: heard.holds("CPU", None, hashes) == nowhere)
    assert below.held(hashes) == ["nvme"] * len(hashes)
    assert heard.holds("STORAGE", "nvme", hashes) == everywhere

    answer(below.llm, prompt)  # comes up again on its way to the engine
    step(below)
    heard.hear(lambda: heard.holds("CPU", None, hashes) == everywhere)

    below.drop(hashes[4:])
    step(below)
    left = [True] * 4 + nowhere[4:]
    heard.hear(lambda: heard.holds("STORAGE", "nvme", hashes) == left)
    assert heard.holds("CPU", None, hashes) == left


def test_an_announcement_describes_its_block(engine: tuple[Below, Subscriber]) -> None:
    below, heard = engine
    prompt = prompt_of("described", 3 * BLOCK_TOKENS)
    hashes = hashes_of(below.llm, prompt)
    store(below.llm, prompt)
    step(below)
    heard.hear(lambda: all(heard.holds("CPU", None, hashes)))
    stored = {
        event.block_hashes[0]: event
        for event in heard.events
        if isinstance(event, BlockStored) and event.medium == "CPU"
    }
    for place, one in enumerate(hashes):
        event = stored[named(one)]
        assert event.token_ids == prompt[place * BLOCK_TOKENS : (place + 1) * BLOCK_TOKENS]
        assert event.parent_block_hash == (named(hashes[place - 1]) if place else None)
        assert (event.block_size, event.group_idx) == (BLOCK_TOKENS, 0)


def test_a_reset_withdraws_everything(engine: tuple[Below, Subscriber]) -> None:
    below, heard = engine
    prompt = prompt_of("reset")
    hashes = hashes_of(below.llm, prompt)
    store(below.llm, prompt)
    step(below)
    heard.hear(lambda: all(heard.holds("CPU", None, hashes)))
    seen = len(heard.events)
    assert below.llm.reset_prefix_cache(reset_connector=True)
    step(below)
    heard.hear(lambda: not any(heard.holds("CPU", None, hashes)))
    withdrawn = [
        block
        for event in heard.events[seen:]
        if isinstance(event, BlockRemoved) and event.medium == "CPU"
        for block in event.block_hashes
    ]
    assert set(map(named, hashes)) <= set(withdrawn)
    store(below.llm, prompt)
    step(below)
    heard.hear(lambda: all(heard.holds("CPU", None, hashes)))


SIZE = 4096


class Follower:
    """A rank's cache, its reader, and what somebody believes who follows the changes alone."""

    def __init__(self, path: Path, **options: object) -> None:
        tiers = [
            {"kind": "dram", "capacity": "64KiB", "extent": "64KiB"},
            {"kind": "nvme", "path": str(path), "capacity": "8MiB"},
        ]
        cache = kvx.TieredCache.open({"tiers": tiers, **options})
        facts = {"model": "m", "dtype": "f", "block_bytes": SIZE, "revision": ""}
        view = kvx.BlockView.of_blocks(np.zeros((4, SIZE), np.uint8))
        self.rank = RankCache(("events", 0), cache, [(facts, view, False)])
        self.reader = EventReader(self.rank, 0)
        self.believed: dict[str, set[bytes]] = {"dram": set(), "nvme": set()}

    @property
    def space(self) -> kvx.CacheSpace:
        return self.rank.groups[0].space

    def store(self, *hashes: bytes) -> None:
        self.reader.expect(0, hashes)
        self.space.offload(list(hashes), np.zeros((len(hashes), SIZE), np.uint8)).wait()

    def follow(self) -> list[TierChange]:
        changes = self.reader.read()
        for change in changes:
            held = self.believed[change.tier]
            for one in change.hashes:
                assert (one in held) is change.is_removed, "said twice"
                (held.remove if change.is_removed else held.add)(one)
        return changes

    def truth(self, hashes: list[bytes]) -> dict[str, set[bytes]]:
        """Return what tiers hold of blocks that the reader has met."""
        keys = self.space.namespace.keys(np.frombuffer(b"".join(hashes), np.uint8).reshape(-1, 32))
        name_of = {key.tobytes(): one for key, one in zip(keys, hashes, strict=True)}
        snapshot = self.rank.cache.snapshot()
        return {
            tier: {
                name_of[key.tobytes()] for key in snapshot.get(tier, ()) if key.tobytes() in name_of
            }
            for tier in ("dram", "nvme")
        }


def hashes_named(count: int) -> list[bytes]:
    return [number.to_bytes(4, "big") * 8 for number in range(count)]


@pytest.fixture
def follow(tmp_path: Path) -> Iterator[Callable[..., Follower]]:
    opened: list[Follower] = []

    def make(**options: object) -> Follower:
        opened.append(Follower(tmp_path / str(len(opened)), **options))
        return opened[-1]

    yield make
    for one in opened:
        one.rank.close()


@pytest.mark.parametrize("capacity", [10_000, 8])
def test_whoever_follows_knows_what_the_tiers_hold(
    follow: Callable[..., Follower], capacity: int
) -> None:
    """With a log of 8 events most are lost, and the reader starts over from a snapshot."""
    one = follow(events_capacity=capacity)
    rng = random.Random(capacity)
    hashes = hashes_named(60)
    for _ in range(40):
        for _ in range(rng.randrange(8)):
            one.store(*rng.sample(hashes, rng.randrange(1, 5)))
            if rng.random() < 0.3:
                one.space.drop(rng.sample(hashes, 3))
        one.rank.cache.flush()
        one.follow()
        assert one.believed == one.truth(hashes)


def test_a_block_that_leaves_and_comes_back_between_two_readings_is_named(
    follow: Callable[..., Follower],
) -> None:
    one = follow()
    (only,) = hashes_named(1)
    one.store(only)
    one.follow()
    one.space.drop([only])
    one.store(only)
    changes = one.follow()
    assert [change.is_removed for change in changes if change.tier == "dram"] == [True, False]


def test_what_arrives_after_a_reset_is_not_announced(follow: Callable[..., Follower]) -> None:
    one = follow()
    (only,) = hashes_named(1)
    former = one.space
    one.reader.expect(0, [only])
    one.rank.begin_life(1)
    former.offload([only], np.zeros((1, SIZE), np.uint8)).wait()
    assert one.follow() == []


def test_memory_is_bounded(
    follow: Callable[..., Follower], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kvx_events, "HELD_MAX", 4)
    monkeypatch.setattr(kvx_events, "AWAITED_MAX", 6)
    one = follow()
    hashes = hashes_named(10)
    one.store(*hashes)
    one.follow()
    assert len(one.believed["dram"]) == 4
    assert len(one.reader._awaited) <= 6
    one.rank.cache.clear()
    one.follow()
    assert one.believed == {"dram": set(), "nvme": set()}


def change(rank: int, *hashes: bytes, is_removed: bool = False) -> TierChange:
    return TierChange(rank, "nvme", is_removed, 0, list(hashes))


def test_a_block_is_there_when_all_ranks_have_it_and_gone_with_the_first() -> None:
    announcer = Announcer(2, {0: 7})

    def said(*changes: TierChange) -> list[tuple[bool, list[Any]]]:
        announcer.note(changes)
        return [(event.removed, event.keys) for event in announcer.take()]

    a, b = make_offload_key(b"a", 7), make_offload_key(b"b", 7)
    assert said(change(0, b"a", b"b")) == []
    assert said(change(1, b"b")) == [(False, [b])]
    assert said(change(1, b"a")) == [(False, [a])]
    assert said(change(1, b"b", b"a", is_removed=True)) == [(True, [b, a])]
    assert said(change(0, b"b", b"a", is_removed=True)) == []
    assert not announcer._ranks, "nothing is kept of what nobody holds"

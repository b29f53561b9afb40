"""A scheduler asks ranks over sockets: it never waits, and who does not answer holds nothing."""

from __future__ import annotations

import logging
import socket
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path

import msgspec
import numpy as np
import pytest

import kvx
from kvx_vllm import rank_link
from kvx_vllm.rank_link import Begin, Link, Locate, Located
from kvx_vllm.rank_server import RankServer
from kvx_vllm.ranks import RanksElsewhere, combined
from tests.waiting import eventually

HASHES = [bytes([number]) * 32 for number in range(6)]
DRAM, NVME, S3, NONE = (
    kvx.TierKind.DRAM, kvx.TierKind.NVME, kvx.TierKind.S3, kvx.TierKind.NONE
)  # fmt: skip


class Holder:
    """A rank: it holds the first blocks of a prompt, and answers while it may."""

    def __init__(self, num_held: int, tier: kvx.TierKind = DRAM) -> None:
        self.num_held = num_held
        self.tier = tier
        self.life = 0
        self.may_answer = threading.Event()
        self.may_answer.set()

    def begin_life(self, life: int) -> bool:
        if life > self.life:
            self.life, self.num_held = life, 0
        return life == self.life

    def locate(self, group: int, hashes: Sequence[bytes], first: int) -> kvx.Location:
        assert self.may_answer.wait(10.0)
        if group:
            raise kvx.UnavailableError("there is one group")
        tiers = np.zeros(len(hashes), np.uint8)
        tiers[: self.num_held] = self.tier
        has_all = self.num_held >= len(hashes)
        return kvx.Location(
            tiers[first:], kvx.MissReason.HIT if has_all else kvx.MissReason.NEVER_STORED
        )


class Clock:
    def __init__(self) -> None:
        self.now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


class Engine:
    """Ranks with their servers, and the scheduler's end."""

    def __init__(self, directory: Path, holders: Sequence[Holder]) -> None:
        self.holders = holders
        self.paths = [directory / f"{number:016x}.sock" for number in range(len(holders))]
        self.servers = [
            RankServer(path, holder) for path, holder in zip(self.paths, holders, strict=True)
        ]
        self.clock = Clock()
        self.ranks = RanksElsewhere(self.paths, 0.25, self.clock)

    def locate(
        self, hashes: Sequence[bytes] = HASHES, first: int = 0, group: int = 0
    ) -> kvx.Location:
        """Ask until there is an answer, as a scheduler does."""
        found: list[kvx.Location] = []

        def is_found() -> bool:
            location = self.ranks.locate(group, hashes, first)
            found.extend([] if location is None else [location])
            return location is not None

        assert eventually(is_found)
        return found[0]

    def close(self) -> None:
        for holder in self.holders:
            holder.may_answer.set()
        self.ranks.close()
        for server in self.servers:
            server.close()


@pytest.fixture
def engine(tmp_path: Path) -> Iterator[Engine]:
    engine = Engine(tmp_path, [Holder(5), Holder(3, NVME)])
    yield engine
    engine.close()


def test_a_block_is_held_if_all_ranks_hold_it(engine: Engine) -> None:
    assert engine.ranks.locate(0, HASHES, 0) is None
    location = engine.locate()
    assert location.tiers.tolist() == [NVME] * 3 + [NONE] * 3
    assert location.reason is kvx.MissReason.NEVER_STORED
    assert location.is_final
    assert engine.locate(first=2).tiers.tolist() == [NVME, NONE, NONE, NONE]
    assert len(engine.locate(first=6).tiers) == 0


def test_every_lookup_asks_anew(engine: Engine) -> None:
    assert engine.locate().tiers.tolist() == [NVME] * 3 + [NONE] * 3
    for holder in engine.holders:
        holder.num_held = 6
    location = engine.locate()
    assert location.tiers.tolist() == [NVME] * 6
    assert location.reason is kvx.MissReason.HIT


def test_a_rank_that_says_nothing_holds_nothing(
    engine: Engine, caplog: pytest.LogCaptureFixture
) -> None:
    engine.holders[1].may_answer.clear()
    for _ in range(2):
        assert engine.ranks.locate(0, HASHES, 0) is None
        engine.clock.now_s += 0.2
        assert engine.ranks.locate(0, HASHES, 0) is None
        engine.clock.now_s += 0.1
        location = engine.locate()
        assert not location.tiers.any()
        assert location.reason is kvx.MissReason.TIER_DOWN
        assert location.is_final
    assert caplog.text.count("rank 1 says nothing within 0.25 s") == 1
    engine.holders[1].may_answer.set()
    assert engine.locate().tiers.any()


def test_a_rank_that_is_gone_holds_nothing_until_it_is_back(
    engine: Engine, caplog: pytest.LogCaptureFixture
) -> None:
    assert engine.locate().tiers.any()
    engine.servers[1].close()
    for _ in range(2):
        location = engine.locate()
        assert not location.tiers.any()
        assert location.reason is kvx.MissReason.TIER_DOWN
    assert caplog.text.count("rank 1 cannot be asked") == 1
    engine.servers[1] = RankServer(engine.paths[1], engine.holders[1])
    assert not engine.locate().tiers.any()
    engine.clock.now_s += 1.1
    assert engine.locate().tiers.any()


def test_after_a_reset_nothing_older_is_found(engine: Engine) -> None:
    engine.holders[1].may_answer.clear()
    assert engine.ranks.locate(0, HASHES, 0) is None  # its answer comes after the reset
    engine.ranks.reset()
    engine.holders[1].may_answer.set()
    assert not engine.locate().tiers.any()
    assert [holder.life for holder in engine.holders] == [1, 1]
    for holder in engine.holders:
        holder.num_held = 2
    assert engine.locate().tiers.tolist() == [NVME] * 2 + [NONE] * 4


def test_a_rank_that_missed_a_reset_learns_of_it_when_it_is_asked(engine: Engine) -> None:
    engine.servers[1].close()
    engine.ranks.reset()
    engine.servers[1] = RankServer(engine.paths[1], engine.holders[1])
    engine.clock.now_s += 1.1
    assert not engine.locate().tiers.any()
    assert engine.holders[1].life == 1


def test_no_more_is_asked_than_ranks_answer(engine: Engine) -> None:
    engine.holders[0].may_answer.clear()
    prompts = [[number.to_bytes(32, "big")] for number in range(300)]
    assert all(engine.ranks.locate(0, prompt, 0) is None for prompt in prompts)
    engine.clock.now_s += 0.3
    given_up, waiting = (engine.ranks.locate(0, prompts[number], 0) for number in (0, 299))
    assert given_up is not None
    assert given_up.reason is kvx.MissReason.TIER_DOWN
    assert waiting is None  # asked now, so that its time begins
    engine.holders[0].may_answer.set()
    assert engine.locate(prompts[299]).tiers.tolist() == [NVME]


def test_an_answer_that_cannot_be_given_is_a_miss(engine: Engine) -> None:
    ranks = engine.ranks
    assert eventually(
        lambda: (found := ranks.locate(1, HASHES, 0)) is not None and not found.tiers.any()
    )
    assert engine.locate().tiers.any()


def test_two_engines_of_one_id_are_told(engine: Engine) -> None:
    with pytest.raises(kvx.ConfigError, match="engine_id"):
        RankServer(engine.paths[0], Holder(1))
    assert engine.locate().tiers.any()


def test_what_a_killed_rank_left_is_replaced(tmp_path: Path) -> None:
    path = tmp_path / f"{0:016x}.sock"
    with socket.socket(socket.AF_UNIX) as gone:
        gone.bind(str(path))
    server = RankServer(path, Holder(1))
    Link.to(path).close()
    server.close()
    assert list(tmp_path.iterdir()) == []
    assert not server._thread.is_alive()


def test_ranks_that_cannot_be_reached_are_told_at_start(engine: Engine, tmp_path: Path) -> None:
    engine.ranks.meet(dict(enumerate(engine.paths)))
    assert engine.locate().tiers.any()
    with pytest.raises(kvx.UnavailableError, match=r"rank 1 listens on .* on its scheduler's"):
        engine.ranks.meet({1: tmp_path / "elsewhere.sock"})


@pytest.mark.parametrize(
    "frame",
    [
        b"\xff\xff\xff\xff",
        b"\x01\0\0\0\xc1",
        b"\x02\0\0\0\x91\x09",
        b"\x02\0\0\0\x91\x01",
        msgspec.msgpack.encode(Locate(1, 0, 0, 7, HASHES)),
        msgspec.msgpack.encode(Located(1, b"", kvx.MissReason.HIT, is_final=True)),
    ],
    ids=["too long", "no msgpack", "no kind", "too short", "before its end", "an answer"],
)
def test_what_is_no_question_ends_only_its_connection(engine: Engine, frame: bytes) -> None:
    if frame[:1] == b"\x96" or frame[:1] == b"\x95":
        frame = len(frame).to_bytes(4, "little") + frame
    with socket.socket(socket.AF_UNIX) as stranger:
        stranger.connect(str(engine.paths[0]))
        stranger.settimeout(10.0)
        stranger.sendall(frame)
        assert stranger.recv(1) == b""
    assert engine.locate().tiers.any()


def test_another_users_connection_is_refused(
    engine: Engine, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(rank_link.os, "geteuid", lambda: 4711)
    with socket.socket(socket.AF_UNIX) as stranger, caplog.at_level(logging.WARNING):
        stranger.connect(str(engine.paths[0]))
        stranger.settimeout(10.0)
        assert stranger.recv(1) == b""
    assert eventually(lambda: "as 4711" in caplog.text)
    with pytest.raises(PermissionError, match="as 4711"):
        Link.to(engine.paths[1])


def test_messages_larger_than_a_socket_holds_arrive() -> None:
    ours, theirs = (Link(one) for one in socket.socketpair())
    hashes = [number.to_bytes(32, "big") for number in range(100_000)]
    ours.send(Locate(1, 0, 0, 0, hashes))
    ours.send(Begin(1))
    assert ours.unsent_bytes
    got: list[object] = []

    def is_here() -> bool:
        got.extend(theirs.receive())
        ours.flush()
        return len(got) == 2

    assert eventually(is_here)
    assert got == [Locate(1, 0, 0, 0, hashes), Begin(1)]
    with pytest.raises(OSError, match="at most"):
        ours.send(Locate(2, 0, 0, 0, [b"\0" * (65 << 20)]))
    ours.close()
    with pytest.raises(ConnectionResetError):
        theirs.receive()
    theirs.close()


def location(*tiers: kvx.TierKind, is_final: bool = True) -> kvx.Location:
    reason = kvx.MissReason.EVICTED if NONE in tiers else kvx.MissReason.HIT
    return kvx.Location(np.array(tiers, np.uint8), reason, is_final)


def test_what_s3_may_hold_is_awaited_only_where_it_helps() -> None:
    awaited = location(DRAM, NONE, is_final=False)
    assert not combined([location(DRAM, DRAM), awaited], 2).is_final
    assert combined([location(DRAM, NONE), awaited], 2).is_final
    assert combined([None, awaited], 2).is_final
    both = combined([location(S3, DRAM, NONE), location(DRAM, NONE, NONE)], 3)
    assert both.tiers.tolist() == [S3, NONE, NONE]
    assert both.reason is kvx.MissReason.EVICTED

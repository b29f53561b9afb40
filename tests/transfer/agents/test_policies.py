"""The pure decisions of agents: routes, waits, states, outcomes, addresses, configuration."""

from __future__ import annotations

import random
import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import kvx
from kvx.errors import (
    CapacityError,
    ConfigError,
    CorruptBlock,
    KvxError,
    PeerLost,
    StaleReference,
    TransferCancelled,
    TransferError,
    TransferTimeout,
    UnavailableError,
    UsageError,
)
from kvx.transfer.agents.address import (
    TcpAddress,
    UnixAddress,
    is_loopback,
    is_loopback_peer,
    parse_address,
    reachable_host,
)
from kvx.transfer.agents.backoff import Backoff
from kvx.transfer.agents.config import AgentConfig
from kvx.transfer.agents.mailbox import Mailbox
from kvx.transfer.agents.outcome import Circumstances, LinkResult, error_of
from kvx.transfer.codes import Code
from kvx.transfer.route import Candidate, Explanation, RouteState, choose

CANDIDATES = [
    Candidate("tcp", 100, ""), Candidate("local", 10, "it is another process"),
    Candidate("shm", 20, ""), Candidate("nixl", 50, "libucx.so.0 is not installed"),
]  # fmt: skip


def test_the_best_possible_backend_is_chosen_and_the_others_say_why() -> None:
    explanation = Explanation("b", choose(CANDIDATES))
    assert str(explanation).splitlines() == [
        "to b:",
        "  shm: chosen",
        "  tcp: possible; shm is preferred",
        "  local: not here because it is another process",
        "  nixl: not here because libucx.so.0 is not installed",
    ]
    assert explanation.chosen is not None
    assert explanation.chosen.backend == "shm"


def test_the_call_and_the_configuration_overrule_rank() -> None:
    forced = choose(CANDIDATES, forced="tcp")
    assert (forced[0].backend, forced[0].state) == ("tcp", RouteState.CHOSEN)
    assert forced[1].reason == "the call takes tcp only"
    allowed = choose(CANDIDATES, allowed=["nixl", "tcp", "shm"])
    assert [route.backend for route in allowed][:2] == ["tcp", "shm"]
    nothing = choose(CANDIDATES, forced="local")
    assert Explanation("b", nothing).chosen is None


@given(st.permutations(CANDIDATES))
def test_the_choice_does_not_depend_on_the_order(candidates: list[Candidate]) -> None:
    assert choose(candidates) == choose(CANDIDATES)


@given(st.integers(1, 2000), st.integers(0, 1 << 32))
def test_waits_grow_and_are_bounded(failures: int, seed: int) -> None:
    wait = Backoff(0.2, 5.0).delay_s(failures, random.Random(seed))
    longest = min(5.0, 0.2 * 2.0 ** min(failures - 1, 40))
    assert longest / 2 <= wait <= longest


def outcome(
    state: str, codes: list[int], *, is_lost: bool = False, verb: str = "read"
) -> KvxError | None:
    array = np.array(codes, np.int32)
    done = int((array == Code.OK).sum())
    result = LinkResult(done, done * 10, array, np.zeros(len(codes), np.uint64), 0.1, "tcp")
    about = Circumstances(verb, "b", "b is frozen", 10 * len(codes), 0.5)
    return error_of(state, result, about, is_lost=is_lost)


@pytest.mark.parametrize(
    ("code", "error", "said"),
    [
        (Code.CORRUPT, CorruptBlock, "block 1 of 3.*checksum"),
        (Code.STALE, StaleReference, "ask b for a new one"),
        (Code.USAGE, UsageError, "b refuses it"),
        (Code.CAPACITY, CapacityError, "no room"),
        (Code.TIMEOUT, TransferTimeout, "saw its deadline"),
        (Code.UNAVAILABLE, UnavailableError, "another backend"),
        (Code.PEER_LOST, PeerLost, "b was lost"),
        (Code.STORAGE, TransferError, "storage"),
    ],
)
def test_every_code_has_its_error(code: Code, error: type[KvxError], said: str) -> None:
    found = outcome("failed", [0, code, Code.SKIPPED])
    assert type(found) is error
    assert re.search(said, str(found))
    assert "1 of 3 blocks (10 of 30 bytes) arrived over tcp" in str(found)


def test_ends_by_state() -> None:
    assert outcome("done", [0, 0]) is None
    timeout = outcome("timed_out", [0, Code.TIMEOUT])
    assert isinstance(timeout, TransferTimeout)
    assert (timeout.bytes_done, timeout.peer) == (10, "b")
    assert "deadline of 0.5 s" in str(timeout)
    assert "b is frozen" in str(timeout)
    assert isinstance(outcome("cancelled", [Code.CANCELLED]), TransferCancelled)
    lost = outcome("failed", [Code.PEER_LOST], is_lost=True, verb="write")
    assert isinstance(lost, PeerLost)
    assert "the write to b" in str(lost)
    assert isinstance(outcome("failed", [Code.CANCELLED, Code.SKIPPED]), TransferError)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("tcp://10.1.2.3:7000", TcpAddress("10.1.2.3", 7000)),
        ("tcp://host.example:0", TcpAddress("host.example", 0)),
        ("tcp://[::1]:1", TcpAddress("::1", 1)),
        ("unix:/run/a.sock", UnixAddress("/run/a.sock")),
    ],
)
def test_addresses(text: str, expected: object) -> None:
    assert parse_address(text) == expected
    assert str(expected) == text


@pytest.mark.parametrize(
    "text", ["", "10.1.2.3:7000", "tcp://a", "tcp://a:70000", "tcp://:1", "unix:", "http://a:1",
             "unix:" + "x" * 108, "tcp://a b:1", "unix:/a\0b"],
)  # fmt: skip
def test_malformed_addresses(text: str) -> None:
    with pytest.raises(UsageError):
        parse_address(text)


def test_what_stays_on_the_host() -> None:
    for host in ("127.0.0.1", "127.9.9.9", "::1", "::ffff:127.0.0.1", "localhost"):
        assert is_loopback(host), host
    for host in ("0.0.0.0", "::", "10.0.0.1", "::ffff:10.0.0.1", "no-such-host.invalid"):  # noqa: S104
        assert not is_loopback(host), host
    assert is_loopback_peer("127.0.0.1:99")
    assert is_loopback_peer("[::1]:99")
    assert not is_loopback_peer("10.0.0.1:99")
    assert not is_loopback_peer("127.0.0.1.evil.example:99")
    assert TcpAddress("0.0.0.0", 1).is_wildcard  # noqa: S104
    assert reachable_host().count(".") == 3


def test_configuration() -> None:
    assert AgentConfig.load(None) == AgentConfig()
    loaded = AgentConfig.load({"piece": "64KiB", "backends": ["tcp"], "peers": ["tcp://a:1"]})
    assert (loaded.piece_bytes, loaded.backends) == (65_536, ("tcp",))
    with pytest.raises(ConfigError, match=r"connections = 5"):
        AgentConfig(connections=5)
    with pytest.raises(ConfigError, match=r"did you mean 'deadline_s'"):
        AgentConfig.load({"deadline": 3})
    with pytest.raises(ConfigError, match=r"suspect_after_s = 50"):
        AgentConfig(suspect_after_s=50.0)
    with pytest.raises(ConfigError, match=r"peers\[1\] = 'b'"):
        AgentConfig.load({"peers": ["tcp://a:1", "b"]})
    with pytest.raises(ConfigError, match=r"backends"):
        AgentConfig.load({"backends": "tcp"})
    assert "AgentConfig" in kvx.__all__


def test_a_mailbox_keeps_the_newest() -> None:
    box: Mailbox[int] = Mailbox(3)
    for number in range(5):
        box.put(number)
    assert box.dropped == 2
    assert box.take() == [2, 3, 4]
    assert box.take(0.01) == []
    box.put(9)
    box.close()
    assert list(box) == [9]

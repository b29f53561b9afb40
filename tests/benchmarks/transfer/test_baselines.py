"""Baselines run small: they move every byte, and whoever moves one less is noticed."""

import contextlib
import subprocess
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from kvx.errors import UnavailableError
from kvx_bench.row import Sample
from kvx_bench.transfer.baselines.bench_memory import TwoMemories
from kvx_bench.transfer.baselines.iperf import Iperf, wait_listening
from kvx_bench.transfer.baselines.limits import Limits
from kvx_bench.transfer.baselines.one_copy import VmCopy, mapped_copies
from kvx_bench.transfer.baselines.sockets import BestTcpStream, SocketStream
from kvx_bench.transfer.baselines.work import Baseline, Work

NUM_BYTES = 1 << 20
# One block, several, and more than process_vm_readv takes in a call.
WORKS = [
    Work(is_write, block_bytes, batch)
    for is_write in (False, True)
    for block_bytes, batch in ((1 << 20, 1), (64 << 10, 7), (512, 1500))
]


@pytest.fixture(scope="module")
def memories() -> Iterator[TwoMemories]:
    with TwoMemories(NUM_BYTES) as made:
        yield made


@pytest.fixture(scope="module")
def baselines(memories: TwoMemories) -> Iterator[dict[str, Baseline]]:
    streams: list[SocketStream | BestTcpStream] = [
        SocketStream(memories, "tcp", buffer_bytes=256 << 10),
        SocketStream(memories, "unix", is_unix=True),
        BestTcpStream(memories),
    ]
    made: list[Baseline] = [*mapped_copies(memories), VmCopy(memories), *streams]
    yield {one.name: one for one in made}
    for stream in streams:
        stream.close()


@pytest.mark.parametrize("work", WORKS, ids=str)
@pytest.mark.parametrize(
    "name",
    ["memfd-memcpy", "memfd-streaming", "memfd-python", "process-vm", "tcp", "unix", "sockets"],
)
def test_every_byte_arrives(baselines: dict[str, Baseline], name: str, work: Work) -> None:
    baseline = baselines[name]
    assert baseline.why_not(work) == ""
    assert baseline.moves_all(work)
    sample = baseline.run(work)
    assert sample.wall_s > 0
    assert sample.cpu_s > 0
    assert baseline.description


@pytest.mark.parametrize("work", WORKS, ids=str)
def test_a_byte_that_did_not_arrive_is_noticed(memories: TwoMemories, work: Work) -> None:
    target, source = memories.sides(work)

    def copy_almost() -> None:
        target[:-1] = source[:-1]

    assert not memories.arrives(work, copy_almost)
    assert not memories.arrives_apart(work, lambda: None)
    copy = mapped_copies(memories)[0]
    assert memories.arrives(work, lambda: copy.run(work))


def test_sockets_only_count_what_came_from_the_second_process(memories: TwoMemories) -> None:
    work = Work(is_write=True, block_bytes=4096, batch=2)
    stream = SocketStream(memories, "unix", is_unix=True)
    short = Work(is_write=True, block_bytes=4096, batch=1)
    assert not memories.arrives_apart(work, lambda: stream.run(short))
    stream.close()


def test_small_exchanges_are_timed(memories: TwoMemories) -> None:
    stream = SocketStream(memories, "unix", is_unix=True)
    p50_us, p99_us = stream.round_trips_us(4096, 20)
    assert 0 < p50_us <= p99_us
    stream.close()


def test_the_fastest_settings_are_chosen(
    memories: TwoMemories, monkeypatch: pytest.MonkeyPatch
) -> None:
    best = BestTcpStream(memories)
    favourite = best._streams[-1]

    def run(self: SocketStream, _work: Work) -> Sample:
        return Sample(1.0 if self is favourite else 2.0, 0.0)

    monkeypatch.setattr(SocketStream, "run", run)
    assert best.run(WORKS[0]).wall_s == 1.0
    assert best.description.startswith(favourite.description)
    best.close()


@contextlib.contextmanager
def program(script: str) -> Iterator[subprocess.Popen[bytes]]:
    """Run a shell script that ends when its standard input is closed."""
    with subprocess.Popen(
        ["/bin/sh", "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0
    ) as process:
        yield process


def test_a_server_is_waited_for_until_it_says_that_it_listens() -> None:
    with program("echo -----; echo Server listening on 7; read end; echo served") as server:
        wait_listening(server, 10.0)
        assert server.stdin is not None
        assert server.stdout is not None
        server.stdin.close()
        assert server.stdout.read().endswith(b"served\n")  # what it says later is left to others


@pytest.mark.parametrize(
    ("script", "patience_s", "reason"),
    [
        ("echo the address is in use", 10.0, "ended.*the address is in use"),
        ("echo -----; read end", 0.1, "waited for 0.1 s.*-----"),
    ],
)
def test_a_server_that_does_not_listen_is_given_up(
    script: str, patience_s: float, reason: str
) -> None:
    with program(script) as server, pytest.raises(UnavailableError, match=reason):
        wait_listening(server, patience_s)


def test_what_is_not_here_is_named_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Iperf, "why_not", lambda _self, _work: "not today")
    with Limits(NUM_BYTES, nixl_python=None) as limits:
        names = {one.name for one in limits.able(WORKS[0])}
        limits.able(WORKS[1])
        reasons = [(one.name, one.reason) for one in limits.absent]
    assert "iperf3" not in names
    assert {"memfd-streaming", "sockets", "unix"} <= names
    assert [reason for name, reason in reasons if name == "iperf3"] == ["not today"]
    assert "--nixl-python" in dict(reasons)["nixl"]


def test_a_python_without_nixl_is_told_from_one_that_has_it(tmp_path: Path) -> None:
    program = tmp_path / "python"
    program.write_text("#!/bin/sh\nexit 3\n")
    program.chmod(0o700)
    with Limits(NUM_BYTES, nixl_python=program) as limits:
        absent = {one.name: one.reason for one in limits.absent}
    assert set(absent) == {"nixl-auto", "nixl-tcp"}
    assert np.all(["second process" in reason for reason in absent.values()])

"""The second process: what it is told when things go wrong, and that it ends."""

import sys

import pytest

from kvx.errors import UnavailableError
from kvx_bench.transfer.child import Child


def child(program: str) -> Child:
    return Child([sys.executable, "-c", "import json, socket, sys\n" + program])


def test_an_error_is_raised_with_what_it_said() -> None:
    program = "s = socket.socket(fileno=int(sys.argv[-1])); s.recv(99); "
    program += 's.sendall(b\'{"error": "no such thing"}\\n\'); s.recv(99)'
    with child(program) as one, pytest.raises(UnavailableError, match="no such thing"):
        one.ask(do="anything")


def test_one_that_ended_is_named_with_its_exit_code() -> None:
    with (
        child("sys.exit(7)") as one,
        pytest.raises(UnavailableError, match="ended with 7 when it was asked to hurry"),
    ):
        one.ask(do="hurry")


def test_it_ends_when_we_hang_up() -> None:
    with Child.of_module("kvx_bench.transfer.baselines.peer") as one:
        assert one.pid > 0
    assert one._process.returncode == 0


def test_one_that_does_not_want_to_end_is_killed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvx_bench.transfer.child._GOODBYE_S", 0.2)
    with child("import time; time.sleep(100)") as one:
        pass
    assert one._process.returncode == -9


def test_one_that_says_nothing_is_not_waited_for_for_ever() -> None:
    with child("sys.stdin.read(); import time; time.sleep(0.5)") as one:
        one.socket.settimeout(0.05)
        with pytest.raises(UnavailableError, match="did not think within"):
            one.ask(do="think")


def test_what_it_cannot_do_it_says() -> None:
    with (
        Child.of_module("kvx_bench.transfer.baselines.peer") as one,
        pytest.raises(UnavailableError, match="cannot dance"),
    ):
        one.ask(do="dance")

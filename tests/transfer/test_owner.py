"""Freezing processes: when it has returned, nothing in them moves."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from kvx.errors import TransferTimeout
from kvx.transfer import owner

BUSY = """
import sys, threading
def work():
    while True: sum(range(100))
for _ in range(8): threading.Thread(target=work, daemon=True).start()
print("busy", flush=True)
sys.stdin.read()
"""


@contextlib.contextmanager
def busy_process() -> Iterator[subprocess.Popen[bytes]]:
    with subprocess.Popen(
        [sys.executable, "-c", BUSY], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"busy\n"
        try:
            yield process
        finally:
            process.kill()


def states(pid: int) -> set[str]:
    stats = [path.read_text() for path in Path(f"/proc/{pid}/task").glob("*/stat")]
    return {stat.rpartition(")")[2].split()[0] for stat in stats}


def test_every_thread_stands_when_freezing_returns() -> None:
    with busy_process() as process:
        for _ in range(50):
            owner.freeze(process.pid)
            assert states(process.pid) == {"T"}
            owner.freeze(process.pid)  # it stands already
            os.kill(process.pid, signal.SIGCONT)


def test_a_process_that_died_is_not_waited_for() -> None:
    with busy_process() as process:
        process.kill()
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
        owner.freeze(process.pid)
        assert process.wait() == -signal.SIGKILL, "how it ended is for who started it"


def test_a_process_that_does_not_stop_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    over = threading.Event()
    monkeypatch.setattr(owner, "_wait_still", lambda _pid: over.wait())
    monkeypatch.setattr(owner, "_END_S", 0.05)
    with busy_process() as process:
        with pytest.raises(TransferTimeout, match=f"process {process.pid} did not stop"):
            owner.freeze(process.pid)
        over.set()

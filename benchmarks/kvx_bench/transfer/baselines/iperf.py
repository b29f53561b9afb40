"""iperf3 over loopback, as everybody measures a network."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import time
from pathlib import Path
from typing import TYPE_CHECKING

from kvx.errors import UnavailableError
from kvx_bench.row import Sample

if TYPE_CHECKING:
    from kvx_bench.transfer.baselines.work import Work

_PROGRAM = "iperf3"
_PATIENCE_S = 60.0
_LOOK_EVERY_S = 0.01
_BLOCK_BYTES_MAX = 1 << 20  # what iperf3 accepts as its --length
# Of less it may end before it has counted anything; what comes out is scaled.
_BYTES_MIN = 16 << 20
_TABLES = (Path("/proc/net/tcp"), Path("/proc/net/tcp6"))
_LISTENS = "0A"


class Iperf:
    """One client and one server a run; both are programs of their own."""

    name = "iperf3"
    description = "iperf3, one tcp stream out of and into one hot block"

    def why_not(self, _work: Work) -> str:
        """It has to be installed."""
        return "" if shutil.which(_PROGRAM) else "iperf3 is not installed (apt-get install iperf3)"

    def run(self, work: Work) -> Sample:
        """Move as many bytes; what it takes to start the programs is not in the wall time."""
        port = _free_port()
        server = _start("--server", "--one-off", "--port", str(port))
        try:
            _wait_listening(port)
            length = min(work.block_bytes, _BLOCK_BYTES_MAX)
            client = _start(
                "--client", "127.0.0.1", "--port", str(port), "--json",
                "--bytes", str(max(work.num_bytes, _BYTES_MIN)), "--length", str(length),
                *([] if work.is_write else ["--reverse"]),
            )  # fmt: skip
            report, cpu_s = _finish(client)
            cpu_s += _finish(server)[1]
        finally:
            if server.returncode is None:
                server.kill()
                server.wait()
        received = json.loads(report)["end"]["sum_received"]
        wall_s = received["seconds"] * work.num_bytes / received["bytes"]
        return Sample(wall_s, cpu_s * work.num_bytes / received["bytes"])

    def moves_all(self, _work: Work) -> bool:
        """Nobody can look: it sends what it likes and keeps nothing."""
        return True


def _start(*arguments: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [_PROGRAM, *arguments], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE
    )


def _finish(process: subprocess.Popen[bytes]) -> tuple[bytes, float]:
    """Return what it printed, and the CPU seconds it used."""
    assert process.stdout is not None, "asked for"
    with process.stdout as printed:
        report = printed.read()
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode != 0:
        raise UnavailableError(f"iperf3 ended with {process.returncode}: {report.decode()[-500:]}")
    return report, usage.ru_utime + usage.ru_stime


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def _wait_listening(port: int) -> None:
    """Look at the kernel's tables: the server serves one connection, so none is left to try."""
    until = time.monotonic() + _PATIENCE_S
    while time.monotonic() < until:
        if any(is_listening(table.read_text(), port) for table in _TABLES if table.exists()):
            return
        time.sleep(_LOOK_EVERY_S)
    raise UnavailableError(f"iperf3 does not listen on port {port}")


def is_listening(table: str, port: int) -> bool:
    """Return whether /proc/net/tcp has a listener: local address and state are fields 1 and 3."""
    rows = (line.split() for line in table.splitlines()[1:])
    return any(row[1].endswith(f":{port:04X}") and row[3] == _LISTENS for row in rows)

"""iperf3 over loopback, as everybody measures a network."""

from __future__ import annotations

import json
import os
import selectors
import shutil
import socket
import subprocess
import time
from typing import TYPE_CHECKING

from kvx.errors import UnavailableError
from kvx_bench.row import Sample

if TYPE_CHECKING:
    from kvx_bench.transfer.baselines.work import Work

_PROGRAM = "iperf3"
_PATIENCE_S = 60.0
_BLOCK_BYTES_MAX = 1 << 20  # what iperf3 accepts as its --length
# Of less it may end before it has counted anything; what comes out is scaled.
_BYTES_MIN = 16 << 20
_LISTENS = b"Server listening"


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
        server = _start("--server", "--one-off", "--forceflush", "--port", str(port))
        try:
            wait_listening(server, _PATIENCE_S)
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
        [_PROGRAM, *arguments], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, bufsize=0
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


def wait_listening(server: subprocess.Popen[bytes], patience_s: float) -> None:
    """Wait until a server says that it listens: it serves one connection, so none is left to try.

    Raises:
        UnavailableError: It ended, or said nothing of it for so many seconds.
    """
    assert server.stdout is not None, "asked for"
    said, until = b"", time.monotonic() + patience_s
    with selectors.DefaultSelector() as selector:
        selector.register(server.stdout, selectors.EVENT_READ)
        while _LISTENS not in said:
            has_more = selector.select(max(0.0, until - time.monotonic()))
            some = os.read(server.stdout.fileno(), 4096) if has_more else b""
            if not some:
                why = "ended" if has_more else f"was waited for {patience_s:g} s"
                raise UnavailableError(
                    f"iperf3 {why} and does not listen; it said: {said.decode()[-500:]!r}"
                )
            said += some

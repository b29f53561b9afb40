"""moto's server in a process of its own: vLLM cannot start where its modules are loaded."""

from __future__ import annotations

import contextlib
import socket
import subprocess
import sys
from collections.abc import Iterator

from kvx_bench.s3.service import Keys, Service
from tests.cache.faults import wait_until


@contextlib.contextmanager
def moto_process() -> Iterator[Service]:
    """Start it, and wait until it listens."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        host, port = probe.getsockname()
    command = [sys.executable, "-m", "moto.server", "-H", host, "-p", str(port)]
    quiet = subprocess.DEVNULL
    with subprocess.Popen(command, stdout=quiet, stderr=quiet) as server:
        try:
            wait_until(lambda: server.poll() is not None or _listens(host, port), 30.0)
            assert server.poll() is None, f"moto's server ended with {server.returncode}"
            yield Service(f"http://{host}:{port}", keys=Keys("anyone", "anything"), software="moto")
        finally:
            server.kill()


def _listens(host: str, port: int) -> bool:
    with socket.socket() as probe:
        probe.settimeout(1.0)
        return probe.connect_ex((host, port)) == 0

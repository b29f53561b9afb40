"""The process that a Ceph belongs to: it ends when whoever wanted it does, however that ends.

`Child.of_module` starts it. The Ceph and its folder go when the socket closes; the kernel closes
that even when the other side was killed.
"""

from __future__ import annotations

import json
import os
import socket
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path

from kvx.errors import UnavailableError
from kvx_bench.s3.ceph import Ceph


def main() -> None:
    """Start what the first line asks for, say where it is, and wait for the end."""
    # In a session of its own: an interrupt at the keyboard is for the one who wants the server.
    os.setsid()
    control = socket.socket(fileno=int(sys.argv[-1]))
    with (
        control,
        control.makefile("rb") as lines,
        tempfile.TemporaryDirectory(prefix="kvx-rgw-", ignore_cleanup_errors=True) as folder,
    ):
        request = json.loads(lines.readline())
        try:
            ceph = Ceph(Path(folder), request["memory_bytes"])
        except UnavailableError as error:
            control.sendall(json.dumps({"error": str(error)}).encode() + b"\n")
            return
        try:
            control.sendall(json.dumps(asdict(ceph.service)).encode() + b"\n")
            lines.readline()
        except ConnectionError:
            pass  # killed; so is what it wanted
        finally:
            ceph.close()


if __name__ == "__main__":
    main()

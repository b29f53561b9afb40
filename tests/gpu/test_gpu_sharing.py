"""Memory of a device in two processes: by IPC handle, and by descriptor sent over a socket."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys

import pytest

from kvx.errors import KvxError
from tests.gpu.rig import Gpu
from tests.sim.cuda_driver import ROOT

MIB = 1 << 20
PEER_S = 60.0


def ask_peer(gpu: Gpu, handle: tuple[bytes, int, int], value: int) -> dict[str, object]:
    """Let another process look at shared memory and fill it with `value`."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    ours.settimeout(PEER_S)
    encoded, fd, size_bytes = handle
    request = json.dumps({"bytes": encoded.hex(), "size_bytes": size_bytes, "write": value})
    with ours:
        with theirs:
            peer = subprocess.Popen(
                [sys.executable, "-m", "tests.gpu.peer", gpu.library, str(theirs.fileno())],
                cwd=ROOT, pass_fds=[theirs.fileno()],
            )  # fmt: skip
        try:
            socket.send_fds(ours, [request.encode()], [fd] if fd >= 0 else [])
            answer = ours.recv(65536)
            assert answer, "the other process ended without an answer"
            assert peer.wait(PEER_S) == 0
        finally:
            peer.kill()
            peer.wait()
    result: dict[str, object] = json.loads(answer)
    return result


@pytest.mark.parametrize("is_exportable", [False, True])
def test_another_process_sees_and_writes_the_memory(gpu: Gpu, is_exportable: bool) -> None:
    if is_exportable and not gpu.device.info()["has_exportable_memory"]:
        pytest.skip("this device has no exportable memory")
    memory = gpu.memory(2 * MIB, is_exportable=is_exportable)
    gpu.write(memory.address, bytes([0x21]) * memory.bytes)
    handle = gpu.device.share(memory)
    assert (handle[1] >= 0) is is_exportable
    assert (handle[0] == b"") is is_exportable
    try:
        answer = ask_peer(gpu, handle, 0x42)
    finally:
        if handle[1] >= 0:
            os.close(handle[1])
    assert answer == {"seen": [0x21], "convictions": 0}
    assert gpu.read(memory.address, memory.bytes) == bytes([0x42]) * memory.bytes


def test_a_handle_that_was_cut_off_is_refused(gpu: Gpu) -> None:
    memory = gpu.memory(MIB)
    encoded, fd, size_bytes = gpu.device.share(memory)
    assert fd == -1
    with pytest.raises(KvxError):
        gpu.device.open_shared(encoded[:-1], -1, size_bytes)
    assert not gpu.device.health()

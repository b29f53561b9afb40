"""Two NIXL agents in two processes, driven over a socket; run by a Python that has NIXL.

It imports nothing of kvx: NIXL comes with an environment of its own, and `nixl.py` beside this file
runs it there. `python nixl_program.py target FD` is the second process of `... initiator FD`.
"""

from __future__ import annotations

import importlib
import json
import mmap
import socket
import subprocess
import sys
import time
from typing import Any

import numpy as np

_BACKEND = "UCX"
# Microseconds that the progress thread sleeps; at 0, the default, it takes a CPU of its own.
_PROGRESS_EVERY_US = 1000
_HUGE_BYTES = 2 << 20
_WARM_UP = 50


class _Side:
    """One agent and its registered, populated memory."""

    def __init__(self, name: str, num_bytes: int) -> None:
        self.nixl: Any = importlib.import_module("nixl_cu13._api")
        _slow_down_progress(self.nixl.nixlBind)
        config = self.nixl.nixl_agent_config(True, False, backends=[_BACKEND])  # noqa: FBT003
        self.agent = self.nixl.nixl_agent(name, config)
        mapped = mmap.mmap(-1, num_bytes + _HUGE_BYTES, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        mapped.madvise(mmap.MADV_HUGEPAGE)
        memory = np.frombuffer(mapped, np.uint8)
        lead = -memory.ctypes.data % _HUGE_BYTES
        self.memory = memory[lead : lead + num_bytes]
        self.memory[:] = 0
        self.address = int(self.memory.ctypes.data)
        where = [(self.address, num_bytes, 0, "")]
        self.registered = self.agent.register_memory(where, "DRAM")

    def answer_common(self, request: dict[str, Any]) -> dict[str, object]:
        """Do what both sides can."""
        part = self.memory[: request.get("num_bytes", 0)]
        match request["do"]:
            case "fill":
                part[:] = request["fill"]
                return {}
            case "look":
                return {"lowest": int(part.min()), "highest": int(part.max())}
        return {"error": f"cannot {request['do']}"}


class _Target(_Side):
    """Waits to be read from and written to; its progress thread does the rest."""

    def answer(self, request: dict[str, Any]) -> dict[str, object]:
        """Do one request."""
        if request["do"] != "meet":
            return self.answer_common(request)
        metadata = self.agent.get_agent_metadata()
        return {"metadata": metadata.hex(), "address": self.address}


class _Initiator(_Side):
    """Posts what it is asked to and polls until it is done."""

    def __init__(self, name: str, num_bytes: int) -> None:
        super().__init__(name, num_bytes)
        ours, theirs = socket.socketpair()
        with theirs:
            command = [sys.executable, __file__, "target", str(theirs.fileno())]
            self._process = subprocess.Popen(command, pass_fds=[theirs.fileno()])
        self._socket = ours
        self._lines = ours.makefile("rb")
        self._handles: dict[tuple[bool, int, int], Any] = {}
        self._ask(do="open", name="target", num_bytes=num_bytes)
        met = self._ask(do="meet")
        self._their_address = met["address"]
        self._peer = self.agent.add_remote_agent(bytes.fromhex(met["metadata"]))
        if isinstance(self._peer, bytes):
            self._peer = self._peer.decode()

    def answer(self, request: dict[str, Any]) -> dict[str, object]:
        """Do one request."""
        match request["do"]:
            case "pids":
                return {"pids": [self._process.pid]}
            case "theirs":
                return self._ask(**request["request"])
            case "run":
                handle = self._handle(
                    request["block_bytes"], request["batch"], is_write=request["is_write"]
                )
                return {"wall_s": self._move(handle)}
            case "latencies":
                handle = self._handle(request["num_bytes"], 1, is_write=False)
                times = [self._move(handle) for _ in range(request["count"] + _WARM_UP)]
                return {"times": times[_WARM_UP:]}
            case "post":
                return self._post(request["block_bytes"], request["batch"], request["count"])
        return self.answer_common(request)

    def close(self) -> None:
        """End the second process."""
        for handle in self._handles.values():
            handle.release()
        self._lines.close()
        self._socket.close()
        self._process.wait()

    def _handle(self, block_bytes: int, batch: int, *, is_write: bool) -> Any:
        """Return a request that can be posted again and again."""
        key = (is_write, block_bytes, batch)
        if key not in self._handles:
            order = np.arange(batch)
            self._handles[key] = self._request(block_bytes, order, order, is_write=is_write)
        return self._handles[key]

    def _request(self, block_bytes: int, ours: Any, theirs: Any, *, is_write: bool) -> Any:
        lists = []
        for base, order in ((self.address, ours), (self._their_address, theirs)):
            rows = np.zeros((len(order), 3), np.uint64)
            rows[:, 0] = base + order * block_bytes
            rows[:, 1] = block_bytes
            lists.append(self.agent.get_xfer_descs(rows, "DRAM"))
        return self.agent.initialize_xfer("WRITE" if is_write else "READ", *lists, self._peer)

    def _post(self, block_bytes: int, batch: int, count: int) -> dict[str, object]:
        """Time submitting blocks in any order, described anew each time and prepared once."""
        ours, theirs = (np.random.default_rng(seed).permutation(batch) for seed in (1, 2))
        anew, prepared = [], []
        for _ in range(count):
            began = time.perf_counter()
            handle = self._request(block_bytes, ours, theirs, is_write=False)
            state = self.agent.transfer(handle)
            anew.append(time.perf_counter() - began)
            self._finish(handle, state)
            began = time.perf_counter()
            state = self.agent.transfer(handle)
            prepared.append(time.perf_counter() - began)
            self._finish(handle, state)
            handle.release()
        return {"anew_s": anew, "prepared_s": prepared}

    def _move(self, handle: Any) -> float:
        began = time.perf_counter()
        self._finish(handle, self.agent.transfer(handle))
        return time.perf_counter() - began

    def _finish(self, handle: Any, state: str) -> None:
        while state == "PROC":
            state = self.agent.check_xfer_state(handle)
        if state != "DONE":
            raise RuntimeError(f"a transfer ended as {state}")

    def _ask(self, **request: object) -> dict[str, Any]:
        self._socket.sendall(json.dumps(request).encode() + b"\n")
        line = self._lines.readline()
        if not line:
            raise RuntimeError("the second process ended")
        answer: dict[str, Any] = json.loads(line)
        return answer


def _slow_down_progress(bindings: Any) -> None:
    """Make every configuration that the wrapper builds keep the delay; it sets 0 itself."""

    class Config(bindings.nixlAgentConfig):  # type: ignore[misc]
        def __setattr__(self, name: str, value: object) -> None:
            super().__setattr__(name, _PROGRESS_EVERY_US if name == "pthrDelay" else value)

    bindings.nixlAgentConfig = Config


def _serve(kind: type[_Initiator | _Target], control: socket.socket) -> None:
    side: _Initiator | _Target | None = None
    for line in control.makefile("rb"):
        request = json.loads(line)
        try:
            if request["do"] == "open":
                side = kind(request["name"], request["num_bytes"])
                answer: dict[str, object] = {}
            else:
                assert side is not None, "opened first"
                answer = side.answer(request)
        except Exception as error:  # noqa: BLE001 - whoever asked is told
            answer = {"error": f"{type(error).__name__}: {error}"}
        control.sendall(json.dumps(answer).encode() + b"\n")
    if isinstance(side, _Initiator):
        side.close()


if __name__ == "__main__":
    with socket.socket(fileno=int(sys.argv[-1])) as ours:
        _serve(_Initiator if sys.argv[1] == "initiator" else _Target, ours)

"""The process of one side: `Child.of_module` starts it, and its first request says which."""

from __future__ import annotations

import json
import socket
import sys
from typing import Any

from kvx_bench.transfer.pair.initiator import Initiator
from kvx_bench.transfer.pair.side import Side, open_agent
from kvx_bench.transfer.pair.target import Target

_SIDES: dict[str, type[Initiator | Target]] = {"initiator": Initiator, "target": Target}


def serve(control: socket.socket) -> None:
    """Answer requests, one a line, until whoever started this hangs up."""
    side: Side | None = None
    try:
        for line in control.makefile("rb"):
            request = json.loads(line)
            try:
                if request["do"] == "open":
                    side = _open(request)
                    answer: dict[str, Any] = {}
                else:
                    assert side is not None, "opened first"
                    answer = side.answer(request)
            except Exception as error:  # noqa: BLE001 - whoever asked is told
                answer = {"error": str(error) or type(error).__name__}
            control.sendall(json.dumps(answer).encode() + b"\n")
    finally:
        if side is not None:
            side.close()


def _open(request: dict[str, Any]) -> Side:
    return _SIDES[request["role"]](open_agent(request), driver=request["driver"])


if __name__ == "__main__":
    with socket.socket(fileno=int(sys.argv[-1])) as ours:
        serve(ours)

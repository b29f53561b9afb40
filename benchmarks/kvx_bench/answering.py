"""How a second process answers: `kvx_bench.transfer.child` is who asks."""

from __future__ import annotations

import json
import socket
import sys
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from collections.abc import Callable


class Answering(Protocol):
    """What answers."""

    def answer(self, request: dict[str, Any]) -> dict[str, Any]:
        """Do what is asked."""

    def close(self) -> None:
        """End."""


def answer_requests(make: Callable[[dict[str, Any]], Answering]) -> None:
    """Answer requests, one a line, until whoever started this hangs up.

    Args:
        make: Is given the first request, which is answered by what it returns.
    """
    made: Answering | None = None
    with socket.socket(fileno=int(sys.argv[-1])) as control:
        for line in control.makefile("rb"):
            request = json.loads(line)
            try:
                made = made or make(request)
                answer = made.answer(request)
            except Exception as error:  # noqa: BLE001 - whoever asked is told
                answer = {"error": f"{type(error).__name__}: {error}"}
            control.sendall(json.dumps(answer).encode() + b"\n")
    if made is not None:
        made.close()

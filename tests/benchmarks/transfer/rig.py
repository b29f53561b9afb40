"""A pair of agents in this process, whose sides a test can lay hands on."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Iterator
from typing import Any

import kvx
from kvx_bench.case import DRIVER
from kvx_bench.transfer.pair.initiator import Initiator
from kvx_bench.transfer.pair.pair import Pair
from kvx_bench.transfer.pair.side import Side
from kvx_bench.transfer.pair.target import Target

BACKEND = "tcp"


class Here:
    """Asks a side directly; what goes in and out is what JSON can carry."""

    def __init__(self, side: Side) -> None:
        self.side = side

    def ask(self, **request: object) -> dict[str, Any]:
        answer: dict[str, Any] = json.loads(
            json.dumps(self.side.answer(json.loads(json.dumps(request))))
        )
        return answer


@contextlib.contextmanager
def pair_here(num_bytes: int) -> Iterator[tuple[Pair, Initiator, Target]]:
    config = {"backends": [BACKEND]}
    with contextlib.ExitStack() as made:
        target = Target(kvx.Agent("bench-target", config=config), driver=DRIVER)
        made.callback(target.close)
        initiator = Initiator(kvx.Agent("bench-initiator", config=config), driver=DRIVER)
        made.callback(initiator.close)
        card = target.answer({"do": "describe"})["card"]
        initiator.answer({"do": "connect", "card": card})
        pair = Pair(Here(initiator), Here(target), lambda: (time.process_time(), 0.0))
        pair.map(num_bytes)
        yield pair, initiator, target

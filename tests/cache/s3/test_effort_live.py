"""Real calls to servers that freeze end at their deadline, and good ones get through bad times."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import time
from typing import TYPE_CHECKING

import numpy as np
import pytest

from kvx.cache.breaker import Breaker
from kvx.cache.s3.effort import Effort
from kvx.cache.s3.store import ObjectError, ObjectFault
from kvx.config import BreakerConfig
from tests.cache.s3.bad_server import MARKS, SILENCE, Answer, BadServer, Ending, part, refusal
from tests.cache.s3.conftest import open_at
from tests.cache.s3.effort_stage import Counts
from tests.sim.stalls import LATE_S, MachineStalls

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from kvx.cache.s3.obstore_store import ObstoreStore

    Serve = Callable[..., BadServer]

CALLS = 200
SIZE = 1000
BODY = bytes(SIZE)
HEADERS = (f"Content-Range: bytes 0-{SIZE - 1}/{SIZE}", *MARKS)
HALF = Answer("206 Partial Content", BODY[:10], HEADERS, SIZE, Ending.HOLD)


@pytest.fixture
def full_queue() -> Iterator[str]:
    """Hand out an endpoint that takes no connections and refuses none."""
    with contextlib.ExitStack() as opened:
        listener = opened.enter_context(socket.create_server(("127.0.0.1", 0), backlog=0))
        for _ in range(4):
            waiting = opened.enter_context(socket.socket())
            waiting.setblocking(False)
            waiting.connect_ex(listener.getsockname())
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"


def make_effort(*, failures: int = 100_000) -> tuple[Effort, Counts]:
    counts = Counts()
    effort = Effort(Breaker(BreakerConfig(failures=failures)), counts, max_in_flight=CALLS)
    return effort, counts


async def late_s_p99(store: ObstoreStore) -> float:
    """Make calls that cannot succeed, with deadlines of 50 to 300 ms; return how late they end."""
    effort, counts = make_effort()
    body, late_s = memoryview(bytes(1 << 20)), []

    async def call(number: int) -> None:
        ends_at = time.monotonic() + 0.05 + 0.25 * number / CALLS
        verb = "put" if number % 2 else "get"
        with pytest.raises(ObjectError) as caught:
            await effort.call(
                verb,
                lambda: (
                    store.get("a", 0, SIZE)
                    if verb == "get"
                    else store.put("a", body, only_if_absent=True)
                ),
                ends_at=ends_at,
                may_hedge=True,
            )
        late_s.append(time.monotonic() - ends_at)
        assert caught.value.fault is ObjectFault.TIMEOUT

    stalls = MachineStalls()
    await asyncio.gather(*(call(number) for number in range(CALLS)))
    stalled_s = stalls.stop()
    assert counts.calls == {ObjectFault.TIMEOUT: CALLS}
    await asyncio.sleep(0)
    return float(np.quantile(late_s, 0.99)) - stalled_s


async def test_a_silent_server(answering: Serve) -> None:
    assert await late_s_p99(open_at(answering(SILENCE).endpoint)) <= LATE_S


async def test_a_server_that_takes_no_connections(full_queue: str) -> None:
    assert await late_s_p99(open_at(full_queue, connect_timeout_s=60)) <= LATE_S


async def test_a_server_that_falls_silent_in_the_middle(answering: Serve) -> None:
    effort, _ = make_effort()
    store = open_at(answering(HALF).endpoint)
    ends_at = time.monotonic() + 0.2
    stalls = MachineStalls()
    with pytest.raises(ObjectError) as caught:
        await effort.call("get", lambda: store.get("a", 0, SIZE), ends_at=ends_at)
    assert time.monotonic() - ends_at - stalls.stop() <= LATE_S
    assert caught.value.fault is ObjectFault.TIMEOUT


BAD_TIMES = [
    refusal("503 Slow Down", "SlowDown"),
    refusal("500 Internal Server Error", "InternalError"),
    refusal("429 Too Many Requests"),
    Answer("206 Partial Content", BODY[:10], HEADERS, SIZE, Ending.CLOSE),
    Answer("206 Partial Content", BODY[:10], HEADERS, SIZE, Ending.RESET),
    part(BODY[:10], 0, SIZE),
    Answer(raw=b"", ending=Ending.CLOSE),
    Answer(raw=b"nonsense\r\n\r\n", ending=Ending.CLOSE),
]


async def test_a_call_gets_through_bad_times(answering: Serve) -> None:
    effort, counts = make_effort()
    server = answering(*BAD_TIMES, part(BODY, 0, SIZE))
    store = open_at(server.endpoint)
    got = await effort.call(
        "get", lambda: store.get("a", 0, SIZE), ends_at=time.monotonic() + 60, may_hedge=True
    )
    assert bytes(got) == BODY
    assert len(server.requests) == len(BAD_TIMES) + 1
    assert counts.retries.total() == len(BAD_TIMES)


async def test_an_endpoint_that_is_gone_is_left_alone() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    store, (effort, counts) = open_at(f"http://127.0.0.1:{port}"), make_effort(failures=3)
    for _ in range(5):
        with pytest.raises(ObjectError):
            await effort.call("head", lambda: store.head("a"), ends_at=time.monotonic() + 60)
    assert counts.attempts == {ObjectFault.CONNECTION: 3}
    assert counts.calls == {ObjectFault.CONNECTION: 1, ObjectFault.AVOIDED: 4}

"""The proxy: an S3 server in a thread of its own that asks a real one, and misbehaves by rule."""

from __future__ import annotations

import asyncio
import contextlib
import random
import ssl
import threading
from collections import Counter
from collections.abc import Callable, Coroutine, Iterator
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import Any, Self, TypeVar

from kvx_bench.s3.service import Service
from tests.s3.faulty.faults import Fault
from tests.s3.faulty.message import HEAD_BYTES_MAX, Request
from tests.s3.faulty.talk import Talk, cut

T = TypeVar("T")

_PATIENCE_S = 30.0
_BACKLOG = 512


@dataclass(frozen=True, slots=True)
class Rule:
    """Which exchanges a fault is for; the first rule that fits decides.

    Attributes:
        fault: It.
        method: Of the requests; empty for all.
        name: Pattern of the objects' names, as in a shell.
        share: How many of those that fit, from 0 to 1.
        attempts_max: Attempts at the same thing that go wrong before it succeeds; None for all.
        when: What else a request has to be.
    """

    fault: Fault
    method: str = ""
    name: str = "*"
    share: float = 1.0
    attempts_max: int | None = None
    when: Callable[[Request], bool] = lambda _: True

    def fits(self, request: Request, dice: random.Random) -> bool:
        """Return whether it is for this request."""
        return (
            self.method in {"", request.method}
            and fnmatchcase(request.name, self.name)
            and (self.attempts_max is None or request.attempt <= self.attempts_max)
            and self.when(request)
            and dice.random() < self.share
        )


@dataclass(slots=True)
class Seen:
    """What became of a request.

    Attributes:
        request: It.
        fault: What went wrong; None for nothing.
        is_heard: Whether the client has taken the whole answer, such as it was.
    """

    request: Request
    fault: Fault | None
    is_heard: bool = False


class FaultProxy:
    """A line to an S3 server. A context manager: leaving it ends its thread.

    What goes wrong depends on the seed and on what is asked how often, never on which request came
    first: the same seed and requests meet the same faults however threads were scheduled.

    Attributes:
        service: Where it listens, for the same keys as the server behind it.
        rules: What goes wrong from now on; may be set at any time.
        seen: What it has been asked, in order.
        num_connects: Connections that were made to it.
    """

    def __init__(
        self, server: Service, *, seed: int = 0, identity: ssl.SSLContext | None = None
    ) -> None:
        """Listen on a free port of loopback; over TLS with an identity."""
        self.rules: tuple[Rule, ...] = ()
        self.seen: list[Seen] = []
        self.num_connects = 0
        self.server = server
        self.moving = asyncio.Event()
        self.moving.set()
        self.thawed = asyncio.Event()
        self._seed = seed
        self._attempts: Counter[str] = Counter()
        self._is_refusing = False
        self._talks: dict[asyncio.Task[None], asyncio.StreamWriter] = {}
        self._begun: dict[asyncio.Task[Any] | None, Seen] = {}
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="fault-proxy")
        self._thread.start()
        self._listener = self._on_loop(self._listen(identity))
        host, port = self._listener.sockets[0].getsockname()
        scheme = "http" if identity is None else "https"
        self.service = replace(server, url=f"{scheme}://{host}:{port}")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @contextlib.contextmanager
    def frozen(self) -> Iterator[None]:
        """Let nothing through, in either direction; who connects is taken, and hears nothing."""
        self._loop.call_soon_threadsafe(self.moving.clear)
        try:
            yield
        finally:
            self._loop.call_soon_threadsafe(self.moving.set)

    @contextlib.contextmanager
    def refusing(self) -> Iterator[None]:
        """Cut every connection as soon as it stands, and all that stand now."""
        self._is_refusing = True
        self._on_loop(self._cut_all())
        try:
            yield
        finally:
            self._is_refusing = False

    def thaw(self) -> None:
        """Let exchanges go on that stand still."""
        self._on_loop(self._thaw())

    def count(self, *, method: str = "") -> int:
        """Return how many requests there were."""
        return sum(method in {"", one.request.method} for one in tuple(self.seen))

    def close(self) -> None:
        """End all that is under way, and the thread."""
        if self._loop.is_closed():
            return
        self._on_loop(self._end())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(_PATIENCE_S)
        assert not self._thread.is_alive(), "the loop of the proxy hangs"
        self._loop.close()

    def begin(self, request: Request) -> tuple[Fault | None, random.Random]:
        """Note a request; returns what is to go wrong with it, and the dice for that."""
        self._attempts[request.identity] += 1
        request = replace(request, attempt=self._attempts[request.identity])
        fault, dice = self._choose(request)
        seen = Seen(request, fault)
        self._begun[asyncio.current_task()] = seen
        self.seen.append(seen)
        return fault, dice

    def end(self) -> None:
        """Note that the client has taken the whole answer to what this task began last."""
        self._begun[asyncio.current_task()].is_heard = True

    def _choose(self, request: Request) -> tuple[Fault | None, random.Random]:
        for place, rule in enumerate(self.rules):
            dice = random.Random(f"{self._seed} {place} {request.identity} {request.attempt}")
            if rule.fits(request, dice):
                return rule.fault, dice
        return None, random.Random(self._seed)

    def _on_loop(self, work: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(_PATIENCE_S)

    async def _listen(self, identity: ssl.SSLContext | None) -> asyncio.Server:
        return await asyncio.start_server(
            self._accept, "127.0.0.1", 0, limit=HEAD_BYTES_MAX, backlog=_BACKLOG, ssl=identity
        )

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.num_connects += 1
        task = asyncio.current_task()
        assert task is not None, "a callback of the listener is a task"
        self._talks[task] = writer
        try:
            if self._is_refusing:
                cut(writer)
            else:
                await Talk(self, reader, writer).run()
        except asyncio.CancelledError:
            pass  # the proxy is closed, or refuses everybody: there is nobody to tell
        finally:
            del self._talks[task]
            self._begun.pop(task, None)

    async def _thaw(self) -> None:
        self.thawed.set()
        self.thawed = asyncio.Event()

    async def _cut_all(self) -> None:
        talks = dict(self._talks)
        for writer in talks.values():
            cut(writer)
        for task in talks:
            task.cancel()
        await asyncio.gather(*talks, return_exceptions=True)

    async def _end(self) -> None:
        self._listener.close()
        await self._cut_all()
        await self._listener.wait_closed()

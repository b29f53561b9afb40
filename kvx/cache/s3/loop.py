"""The one thread on which all calls of an S3 tier run."""

from __future__ import annotations

import asyncio
import concurrent.futures
import logging
import threading
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine

_log = logging.getLogger(__name__)


class LoopThread:
    """An asyncio loop on a daemon thread. Thread-safe."""

    def __init__(self, name: str) -> None:
        """Start it."""
        self._loop = asyncio.new_event_loop()
        self._tasks: set[asyncio.Task[Any]] = set()
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def call(self, callback: Callable[[], object]) -> bool:
        """Have `callback` called there, soon; False once it is closed."""
        try:
            self._loop.call_soon_threadsafe(callback)
        except RuntimeError:
            _log.debug("the loop is closed: a call is not made any more")
            return False
        return True

    def spawn(self, work: Coroutine[Any, Any, object]) -> None:
        """Run a coroutine there that nobody waits for; what it raises is logged."""

        def begin() -> None:
            task = self._loop.create_task(self._logged(work))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

        if not self.call(begin):
            work.close()

    def wait(self, work: Coroutine[Any, Any, object], timeout_s: float) -> bool:
        """Run a coroutine there and wait for it; False when time was up, and it is cancelled."""
        future = asyncio.run_coroutine_threadsafe(work, self._loop)
        try:
            future.result(timeout_s)
        except (TimeoutError, concurrent.futures.CancelledError):
            future.cancel()
            return False
        return True

    def close(self, timeout_s: float) -> None:
        """Cancel what runs and end the thread; calling it twice does no harm."""
        if self._thread.is_alive():
            self.call(self._loop.stop)
            self._thread.join(timeout_s)

    @staticmethod
    async def _logged(work: Coroutine[Any, Any, object]) -> None:
        try:
            await work
        except asyncio.CancelledError:
            raise
        except Exception:  # noqa: BLE001 - nobody waits for it
            _log.exception("a task of the S3 tier failed")

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        self._loop.run_forever()
        left = asyncio.all_tasks(self._loop)
        for task in left:
            task.cancel()
        self._loop.run_until_complete(asyncio.gather(*left, return_exceptions=True))
        self._loop.run_until_complete(self._loop.shutdown_asyncgens())
        self._loop.close()

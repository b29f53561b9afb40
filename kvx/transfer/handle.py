"""The handle of one batch on its way: wait for it, await it, poll it, cancel it.

Invariant: a transfer reaches exactly one terminal state and keeps it. A timeout of `wait` ends the
waiting, not the transfer; the deadline given when it was started ends the transfer.
"""

from __future__ import annotations

import asyncio
import contextlib
import enum
import logging
import threading
import time
import warnings
from typing import TYPE_CHECKING, Generic, Protocol, TypeVar

from kvx.buffers import stream_handle
from kvx.errors import KvxError, TransferCancelled, TransferTimeout

if TYPE_CHECKING:
    from collections.abc import Callable, Generator

ResultT = TypeVar("ResultT")
_log = logging.getLogger(__name__)


class TransferState(enum.Enum):
    """Where a transfer stands; all but PENDING are terminal."""

    PENDING = "pending"
    DONE = "done"
    FAILED = "failed"
    TIMED_OUT = "timed_out"
    CANCELLED = "cancelled"


class Driver(Protocol):
    """Whoever moves the bytes of a transfer."""

    def drive(self, timeout_s: float) -> None:
        """Help the transfer along on the caller's thread for `timeout_s` at most."""

    def cancel(self) -> None:
        """Stop what has not begun; the transfer becomes terminal soon."""

    def wait_layer(self, layer: int, timeout_s: float | None) -> int:
        """See `Transfer.wait_layer`."""

    def wait_on_stream(self, stream: int, layer: int | None) -> None:
        """See `Transfer.wait_on_stream`."""

    def wait_quiesced(self, timeout_s: float) -> bool:
        """See `Transfer.wait_quiesced`."""


def state_of(error: KvxError | None) -> TransferState:
    """Return the terminal state that an outcome stands for."""
    match error:
        case None:
            return TransferState.DONE
        case TransferTimeout():
            return TransferState.TIMED_OUT
        case TransferCancelled():
            return TransferState.CANCELLED
        case _:
            return TransferState.FAILED


class Transfer(Generic[ResultT]):
    """One batch of blocks on its way.

    Dropping the handle neither cancels the transfer nor frees memory that bytes still move in. A
    failure that nobody looked at is warned about once.
    """

    def __init__(self, driver: Driver, description: str) -> None:
        """Make a pending transfer; its driver completes it with `complete`."""
        self._driver = driver
        self._description = description
        self._lock = threading.Lock()
        self._is_finished = False
        self._finished: threading.Event | None = None  # made by the first who sleeps
        self._result: ResultT | None = None
        self._error: KvxError | None = None
        self._observed = False
        self._callbacks: list[Callable[[], None]] = []

    def poll(self) -> TransferState:
        """Return the state now. Never blocks."""
        return state_of(self._error) if self._is_finished else TransferState.PENDING

    def wait(self, timeout_s: float | None = None) -> ResultT:
        """Block until the transfer is terminal; other threads run meanwhile.

        Args:
            timeout_s: Seconds to wait at most; None waits for the transfer's own deadline.

        Returns:
            What the transfer was started for; misses are in it, they are not errors.

        Raises:
            TransferTimeout: The deadline of the transfer passed, or `timeout_s` did (then the
                transfer is still under way and may be waited for again).
            TransferCancelled: It was cancelled, or its cache was closed.
            KvxError: Whatever else ended it.
        """
        end = None if timeout_s is None else time.monotonic() + timeout_s
        while not self._is_finished:
            remaining = 3600.0 if end is None else end - time.monotonic()
            if remaining <= 0:
                raise TransferTimeout(
                    f"{self._description} is still under way after {timeout_s} s; wait again, or "
                    "cancel() it"
                )
            self._driver.drive(remaining)
        return self._outcome()

    def wait_layer(self, layer: int, timeout_s: float | None = None) -> int:
        """Block until a layer of all blocks has arrived, while later ones are on their way.

        For transfers into device memory that were started with `is_layerwise`; of any other the
        only layer is the whole. A layer is there only once every block has been verified, so the
        blocks counted here will not turn out damaged; they can still fail to arrive by the
        deadline, which the next call says.

        Args:
            layer: From 0.
            timeout_s: Seconds to wait at most; None waits for the transfer's own deadline.

        Returns:
            How many leading blocks have this layer: what may be built on.

        Raises:
            UsageError: The transfer has no such layer.
            TransferTimeout: As `wait`.
            KvxError: Whatever ended the transfer.
        """
        return self._driver.wait_layer(layer, timeout_s)

    def wait_on_stream(self, stream: object, layer: int | None = None) -> None:
        """Make a CUDA stream wait for the transfer, or one layer, instead of this thread.

        Returns at once. The stream goes on when the transfer ends, whatever its outcome: look at it
        before you use what the stream computed.

        Args:
            stream: A CUstream as int, or any object with `__cuda_stream__`.
            layer: As `wait_layer`; None for all of them.

        Raises:
            UsageError: The transfer does not touch device memory, or has no such layer.
            UnavailableError: The driver cannot make streams wait for host memory; `wait` instead.
        """
        self._driver.wait_on_stream(stream_handle(stream), layer)

    def wait_quiesced(self, timeout_s: float) -> bool:
        """Wait until nothing reads or writes the blocks that the transfer was given any more.

        A transfer that is done has quiesced. One that was cancelled or timed out has ended although
        a copy may still be under way: until this returns True its source must not be freed, and its
        target neither read, nor freed, nor given to somebody else.

        A cache answers for those blocks alone. A disk or a network that hangs for ever holds up
        kvx's own memory, which stays in quarantine, and not this.

        Args:
            timeout_s: Seconds to wait at most; 0 to ask.

        Returns:
            False when time was up first.
        """
        return self._driver.wait_quiesced(timeout_s)

    def wait_finished(self, timeout_s: float) -> bool:
        """Sleep until somebody else completes the transfer; for drivers. True once terminal."""
        with self._lock:
            if self._is_finished:
                return True
            if self._finished is None:
                self._finished = threading.Event()
        return self._finished.wait(timeout_s)

    def __await__(self) -> Generator[object, None, ResultT]:
        """Suspend the task until the transfer is terminal, then behave as `wait`."""
        loop = asyncio.get_running_loop()
        future: asyncio.Future[None] = loop.create_future()

        def wake() -> None:
            if not future.done():
                future.set_result(None)

        def call_wake() -> None:
            # The loop is closed when whoever awaited was stopped and is gone.
            with contextlib.suppress(RuntimeError):
                loop.call_soon_threadsafe(wake)

        self.add_done_callback(call_wake)
        yield from future
        return self._outcome()

    def add_done_callback(self, callback: Callable[[], None]) -> None:
        """Call `callback` once when terminal: at once if it is, else on the completing thread.

        There, what it raises is logged: that thread completes other transfers too.
        """
        with self._lock:
            if not self._is_finished:
                self._callbacks.append(callback)
                return
        callback()

    def cancel(self) -> bool:
        """Ask to stop.

        Returns:
            False when the transfer had already ended; its outcome then stands. True otherwise;
            `wait` tells how it ended.
        """
        if self._is_finished:
            return False
        self._driver.cancel()
        return True

    @property
    def result(self) -> ResultT | None:
        """What has been reached, also after a timeout or cancel; None while pending."""
        return self._result

    @property
    def error(self) -> KvxError | None:
        """Why the transfer failed; None while pending or when done."""
        self._observed = True
        return self._error

    def complete(self, result: ResultT, error: KvxError | None = None) -> bool:
        """Make the transfer terminal; for its driver. False if it already was."""
        with self._lock:
            if self._is_finished:
                return False
            self._result = result
            self._error = error
            self._is_finished = True
            if self._finished is not None:
                self._finished.set()
            callbacks, self._callbacks = self._callbacks, []
        for callback in callbacks:
            try:
                callback()
            except Exception:  # noqa: BLE001 - logged here
                _log.exception("a callback of %s failed", self._description)
        return True

    def _outcome(self) -> ResultT:
        self._observed = True
        if self._error is not None:
            raise self._error
        assert self._result is not None, "a terminal transfer has a result"
        return self._result

    def __del__(self) -> None:
        """Warn when a failure was never looked at."""
        if self._is_finished and self._error is not None and not self._observed:
            warnings.warn(
                f"nobody looked at the failure of {self._description}: {self._error}",
                ResourceWarning,
                stacklevel=2,
            )


def wait_all(transfers: list[Transfer[ResultT]], timeout_s: float | None = None) -> list[ResultT]:
    """Wait for all transfers, also when some fail; then raise the first failure.

    Args:
        transfers: Any number of them, of one or several caches.
        timeout_s: Seconds for all of them together; None for each one's own deadline.

    Raises:
        KvxError: The first failure in list order, after all have ended or the time was up.
    """
    end = None if timeout_s is None else time.monotonic() + timeout_s
    results: list[ResultT] = []
    first_error: KvxError | None = None
    for transfer in transfers:
        try:
            results.append(transfer.wait(None if end is None else max(0.0, end - time.monotonic())))
        except KvxError as error:
            first_error = first_error or error
    if first_error is not None:
        raise first_error
    return results

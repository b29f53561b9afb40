"""The handle of a transfer: one outcome, seen by whoever waits, awaits, polls or cancels."""

from __future__ import annotations

import asyncio
import gc
import logging
import threading
import time
import warnings

import pytest

from kvx.errors import KvxError, StorageError, TransferCancelled, TransferTimeout
from kvx.transfer.handle import Transfer, TransferState, wait_all


class ByHand:
    """A driver whose transfer the test completes; `drive` sleeps until it does."""

    def __init__(self, *, cancels: bool = True) -> None:
        self.transfer: Transfer[str] = Transfer(self, "a test transfer")
        self.cancels = cancels
        self.num_driven = 0

    def drive(self, timeout_s: float) -> None:
        self.num_driven += 1
        self.transfer.wait_finished(min(timeout_s, 0.01))

    def cancel(self) -> None:
        if self.cancels:
            self.transfer.complete("part", TransferCancelled("cancelled", bytes_done=3))


@pytest.fixture
def driver() -> ByHand:
    return ByHand()


def completed(result: str, error: KvxError | None = None) -> Transfer[str]:
    transfer = ByHand().transfer
    transfer.complete(result, error)
    return transfer


def soon(action: object) -> threading.Timer:
    assert callable(action)
    timer = threading.Timer(0.02, action)
    timer.start()
    return timer


def test_a_pending_transfer_has_no_outcome(driver: ByHand) -> None:
    assert driver.transfer.poll() is TransferState.PENDING
    assert driver.transfer.result is None
    assert driver.transfer.error is None


@pytest.mark.parametrize(
    ("error", "state"),
    [
        (None, TransferState.DONE),
        (StorageError("m"), TransferState.FAILED),
        (TransferTimeout("m"), TransferState.TIMED_OUT),
        (TransferCancelled("m"), TransferState.CANCELLED),
    ],
)
def test_every_terminal_state(error: KvxError | None, state: TransferState) -> None:
    transfer = completed("result", error)
    assert transfer.poll() is state
    assert transfer.error is error
    assert transfer.result == "result"
    if error is None:
        assert transfer.wait() == transfer.wait(timeout_s=0) == "result"
    else:
        for _ in range(2):
            with pytest.raises(type(error)) as caught:
                transfer.wait()
            assert caught.value is error


def test_the_first_outcome_stands(driver: ByHand) -> None:
    assert driver.transfer.complete("first")
    assert not driver.transfer.complete("second", StorageError("late"))
    assert driver.transfer.wait() == "first"
    assert driver.transfer.error is None


def test_wait_drives_until_it_is_over(driver: ByHand) -> None:
    timer = soon(lambda: driver.transfer.complete("result"))
    assert driver.transfer.wait(timeout_s=10) == "result"
    assert driver.num_driven > 0
    timer.join()


def test_a_timeout_of_wait_is_not_the_end(driver: ByHand) -> None:
    start_s = time.monotonic()
    with pytest.raises(TransferTimeout, match=r"test transfer is still under way after 0\.05 s"):
        driver.transfer.wait(timeout_s=0.05)
    assert 0.05 <= time.monotonic() - start_s < 5
    with pytest.raises(TransferTimeout):
        driver.transfer.wait(timeout_s=0)
    assert driver.transfer.poll() is TransferState.PENDING
    driver.transfer.complete("result")
    assert driver.transfer.wait() == "result"


def test_many_threads_wait_for_one(driver: ByHand) -> None:
    found: list[str] = []
    threads = [
        threading.Thread(target=lambda: found.append(driver.transfer.wait(10))) for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    driver.transfer.complete("result")
    for thread in threads:
        thread.join()
    assert found == ["result"] * 4


async def test_it_can_be_awaited(driver: ByHand) -> None:
    timer = soon(lambda: driver.transfer.complete("result"))
    assert await driver.transfer == "result"
    assert await driver.transfer == "result"
    timer.join()


async def test_many_tasks_await_one(driver: ByHand) -> None:
    async def wait() -> str:
        return await driver.transfer

    tasks = [asyncio.create_task(wait()) for _ in range(3)]
    await asyncio.sleep(0)
    tasks[0].cancel()
    driver.transfer.complete("result")
    assert await asyncio.gather(*tasks[1:]) == ["result", "result"]
    with pytest.raises(asyncio.CancelledError):
        await tasks[0]


async def test_awaiting_a_failure_raises_it(driver: ByHand) -> None:
    driver.transfer.complete("part", StorageError("no disk"))
    with pytest.raises(StorageError, match="no disk"):
        await driver.transfer


async def test_a_task_that_stops_waiting_does_not_cancel(driver: ByHand) -> None:
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(driver.transfer, 0.02)
    assert driver.transfer.poll() is TransferState.PENDING


def test_completing_after_the_loop_is_gone(
    driver: ByHand, caplog: pytest.LogCaptureFixture
) -> None:
    """Whoever awaited was stopped, its loop is closed: the completing thread must not suffer."""

    async def main() -> None:
        await asyncio.wait_for(driver.transfer, 0.01)

    with pytest.raises(TimeoutError):
        asyncio.run(main())
    with caplog.at_level(logging.DEBUG):
        assert driver.transfer.complete("result")
    assert caplog.text == ""
    assert driver.transfer.wait() == "result"


def test_callbacks_run_once(driver: ByHand) -> None:
    calls: list[str] = []
    driver.transfer.add_done_callback(lambda: calls.append(driver.transfer.poll().value))
    assert calls == []
    driver.transfer.complete("result")
    driver.transfer.complete("again")
    driver.transfer.add_done_callback(lambda: calls.append("late"))
    assert calls == ["done", "late"]


def test_a_failing_callback_does_not_stop_the_others(
    driver: ByHand, caplog: pytest.LogCaptureFixture
) -> None:
    calls: list[int] = []

    def fail() -> None:
        raise RuntimeError("not my day")

    driver.transfer.add_done_callback(fail)
    driver.transfer.add_done_callback(lambda: calls.append(1))
    assert driver.transfer.complete("result")
    assert calls == [1]
    assert "not my day" in caplog.text


def test_cancel_tells_the_truth(driver: ByHand) -> None:
    assert driver.transfer.cancel()
    assert driver.transfer.poll() is TransferState.CANCELLED
    assert driver.transfer.result == "part"
    assert not driver.transfer.cancel()
    with pytest.raises(TransferCancelled) as caught:
        driver.transfer.wait()
    assert caught.value.bytes_done == 3


def test_cancel_after_the_end_changes_nothing() -> None:
    transfer = completed("result")
    assert not transfer.cancel()
    assert transfer.wait() == "result"


def test_cancel_may_come_too_late() -> None:
    """True means asked, not stopped: the outcome is whatever `wait` tells."""
    driver = ByHand(cancels=False)
    assert driver.transfer.cancel()
    driver.transfer.complete("result")
    assert driver.transfer.wait() == "result"


def test_an_unobserved_failure_warns_once() -> None:
    with pytest.warns(ResourceWarning, match="nobody looked at the failure of a test transfer: m$"):
        _drop(completed("part", StorageError("m")))


def _drop(transfer: Transfer[str]) -> None:
    """Forget the last reference inside the caller's `pytest.warns`."""
    del transfer
    gc.collect()


@pytest.mark.parametrize("look", ["wait", "error"])
def test_an_observed_failure_does_not_warn(look: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        transfer = completed("part", StorageError("m"))
        if look == "wait":
            with pytest.raises(StorageError):
                transfer.wait()
        else:
            assert transfer.error is not None
        del transfer
        _drop(completed("result"))
        _drop(ByHand().transfer)
        gc.collect()


def test_wait_all_returns_in_order() -> None:
    transfers = [completed(name) for name in "abc"]
    assert wait_all(transfers) == ["a", "b", "c"]
    assert wait_all([]) == []


def test_wait_all_waits_for_all_and_then_raises_the_first() -> None:
    late = ByHand()
    timer = soon(lambda: late.transfer.complete("late"))
    transfers = [
        completed("a", StorageError("first")),
        late.transfer,
        completed("c", TransferCancelled("second")),
    ]
    with pytest.raises(StorageError, match="first"):
        wait_all(transfers)
    assert late.transfer.poll() is TransferState.DONE
    timer.join()


def test_wait_all_shares_one_timeout() -> None:
    stuck = [ByHand() for _ in range(5)]
    ready = completed("ready")
    start_s = time.monotonic()
    with pytest.raises(TransferTimeout, match="still under way"):
        wait_all([one.transfer for one in stuck] + [ready], timeout_s=0.4)
    assert time.monotonic() - start_s < 1.5

"""CPU time of other processes."""

import os
import subprocess
import sys
import threading
import time

import pytest

from kvx_bench.transfer.cpu_clock import process_cpu_s, timed_with

# Uses 0.1 s of CPU on a thread that is not the main one, sleeps as long, then waits to be read.
_BUSY = """
import sys, threading, time
def spin():
    while time.thread_time() < 0.1:
        pass
one = threading.Thread(target=spin)
one.start()
one.join()
time.sleep(0.1)
print(time.process_time(), flush=True)
sys.stdin.read()
"""


def test_all_threads_of_another_process_count_and_its_sleep_does_not() -> None:
    child = subprocess.Popen(
        [sys.executable, "-c", _BUSY], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    with child:
        assert child.stdout is not None
        said = float(child.stdout.readline())
        seen = process_cpu_s(child.pid)
        child.kill()
    assert said >= 0.1
    assert said <= seen < said + 0.05


def test_both_sides_are_added_up() -> None:
    program = "import time\nprint(flush=True)\nwhile True: time.process_time()"
    child = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE)
    with child:
        assert child.stdout is not None
        child.stdout.readline()

        def wait_for_it() -> None:
            until = process_cpu_s(child.pid) + 0.05
            while process_cpu_s(child.pid) < until:
                time.sleep(0.001)

        alone = timed_with(lambda: time.sleep(0.05), [])
        sample = timed_with(wait_for_it, [child.pid])
        child.kill()
    assert sample.cpu_s >= 0.05
    assert alone.cpu_s < 0.05
    assert alone.wall_s >= 0.05


def test_a_process_that_is_gone_is_an_error() -> None:
    child = subprocess.Popen([sys.executable, "-c", ""])
    child.wait()
    with pytest.raises(OSError, match="Invalid"):
        process_cpu_s(child.pid)


def test_the_own_process_reads_as_it_reads_itself() -> None:
    # Threads that ended still count: the clock is that of the process.
    thread = threading.Thread(target=sum, args=(range(200_000),))
    thread.start()
    thread.join()
    before = time.process_time()
    assert before <= process_cpu_s(os.getpid()) <= time.process_time() + 1e-4

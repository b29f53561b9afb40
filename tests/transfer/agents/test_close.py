"""What a closed agent leaves behind: nothing, and at once."""

from __future__ import annotations

import gc
import logging
from pathlib import Path

import numpy as np
import pytest

import kvx

KEY = b"a key of closing agents"


def _open_and_close() -> None:
    with (
        kvx.Agent("left", key=KEY) as left,
        kvx.Agent("right", key=KEY, listen="tcp://127.0.0.1:0") as right,
    ):
        memory = np.zeros((4, 64), np.uint8)
        registration = right.register(memory)
        token = registration.lease().token
        peer = left.connect(right.export())
        local = left.register(np.zeros((4, 64), np.uint8))
        remote = peer.descriptors([0], [256], lease=token)
        left.read(local.descriptors([0], [256]), remote).wait()


def test_descriptors_do_not_wait_for_the_garbage_collector(
    caplog: pytest.LogCaptureFixture,
) -> None:
    # What is logged keeps errors, with all that their frames know.
    caplog.set_level(logging.CRITICAL, logger="kvx")
    _open_and_close()
    gc.collect()
    before = len(list(Path("/proc/self/fd").iterdir()))
    gc.disable()
    try:
        for _ in range(3):
            _open_and_close()
        assert len(list(Path("/proc/self/fd").iterdir())) == before
    finally:
        gc.enable()

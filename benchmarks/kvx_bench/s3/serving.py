"""What an engine does all day, while the bucket answers and while it does not."""

from __future__ import annotations

import contextlib
import time
from typing import TYPE_CHECKING

import numpy as np

from kvx.errors import TransferError
from kvx_bench.row import timed
from kvx_bench.s3.clients.kvx_client import KvxClient, hashes_of

if TYPE_CHECKING:
    import numpy.typing as npt

# A prompt goes on where nobody has been before: the bucket is asked each time.
_TAIL_BLOCKS = 16
_DEADLINE_S = 60.0
_strangers = np.random.default_rng()


def keep(client: KvxClient, prompt: int, blocks: npt.NDArray[np.uint8]) -> None:
    """Leave a prompt in the tiers of this host, whatever becomes of it in the bucket."""
    hashes = hashes_of(prompt, len(blocks))
    result = client.space.offload(hashes, blocks, deadline_s=_DEADLINE_S).wait()
    assert result.num_blocks == len(blocks), "everything was taken"
    client.cache.flush(_DEADLINE_S)


def serve(
    client: KvxClient, prompt: int, target: npt.NDArray[np.uint8], seconds: float
) -> dict[str, object]:
    """Onboard a prompt that is here over and over; returns what it took for each time.

    Every time it is matched with a tail that nobody knows, so that the bucket is asked for that.
    """
    held = hashes_of(prompt, len(target))
    rounds = 0

    def work() -> None:
        nonlocal rounds
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            tail = _strangers.integers(0, 256, (_TAIL_BLOCKS, held.shape[1]), dtype=np.uint8)
            found = client.space.match(np.concatenate([held, tail]))
            assert found.num_blocks == len(held), f"{found.num_blocks} of {len(held)} are here"
            result = client.space.onboard(held, target, deadline_s=_DEADLINE_S).wait()
            assert result.num_blocks == len(held), f"{result.num_blocks} of {len(held)} arrived"
            rounds += 1

    sample = timed(work)
    return {"wall_s": sample.wall_s / rounds, "cpu_s": sample.cpu_s / rounds}


def ask_far(client: KvxClient, prompt: int, count: int, deadline_s: float) -> dict[str, object]:
    """Ask for blocks that the bucket alone has; returns the seconds until each request ended."""
    hashes = hashes_of(prompt, _TAIL_BLOCKS)
    times = []
    for _ in range(count):
        began = time.perf_counter()
        with contextlib.suppress(TransferError):  # its end is what is measured, whatever it is
            client.space.prefetch(hashes, deadline_s=deadline_s).wait()
        times.append(time.perf_counter() - began)
    return {"times": times}

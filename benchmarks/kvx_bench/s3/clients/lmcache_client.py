"""awscrt as LMCache's S3 connector uses it.

LMCache itself comes with torch and an engine. What its connector does is little: a client with 64
threads and default settings, one object a chunk, every request of a batch begun at once and waited
for on an asyncio loop, bodies taken by a callback that copies each piece.

Source: LMCache 0.5.6, lmcache/v1/distributed/l2_adapters/s3_l2_adapter.py.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from awscrt import auth, s3

from kvx_bench.s3.clients.awscrt_client import (
    bootstrap_of,
    get_request,
    put_request,
    tls_mode_of,
)

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from kvx_bench.s3.clients.client import Place

_THREADS = 64


class LmcacheClient:
    """One object a block, all of them at once."""

    description = (
        "LMCache's way: awscrt's S3Client, 64 threads, all requests begun at once "
        "(LMCache itself is not run: it needs torch, and buckets in the host's name)"
    )

    def __init__(self, place: Place) -> None:
        """Start its threads."""
        self._place = place
        self._runner = asyncio.Runner()
        bootstrap = bootstrap_of(_THREADS)
        self._provider = auth.AwsCredentialsProvider.new_default_chain(bootstrap)
        self._client = s3.S3Client(
            bootstrap=bootstrap, region=place.region, tls_mode=tls_mode_of(place)
        )

    def prepare(self) -> None:
        """Nothing is held."""

    def put(self, prompt: int, source: npt.NDArray[np.uint8]) -> None:
        """Store all of them."""
        rows = enumerate(source)
        self._all([put_request(self._place, prompt, number, row) for number, row in rows])

    def get(self, prompt: int, target: npt.NDArray[np.uint8]) -> None:
        """Bring all of them."""
        rows = enumerate(target)
        self._all([get_request(self._place, prompt, number, row) for number, row in rows])

    def close(self) -> None:
        """End the loop; the threads end with the process."""
        self._runner.close()

    def _all(self, requests: list[dict[str, object]]) -> None:
        async def everything() -> None:
            begun = [
                s3.S3Request(
                    client=self._client, credential_provider=self._provider,
                    region=self._place.region, **request,
                )
                for request in requests
            ]  # fmt: skip
            await asyncio.gather(*(asyncio.wrap_future(one.finished_future) for one in begun))

        self._runner.run(everything())

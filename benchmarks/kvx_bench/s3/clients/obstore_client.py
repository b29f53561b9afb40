"""obstore: object_store of Apache Arrow, in Rust, behind asyncio."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import numpy as np
import obstore
from obstore.store import S3Store

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    import numpy.typing as npt

    from kvx_bench.s3.clients.client import Place


class ObstoreClient:
    """One object a block; as many tasks as there may be requests."""

    description = "obstore, one object a block, bodies copied into place"

    def __init__(self, place: Place) -> None:
        """Connect when there is something to do."""
        self._place = place
        self._runner = asyncio.Runner()
        self._store = S3Store(
            place.bucket, endpoint=place.url, region=place.region, unsigned_payload=True,
            virtual_hosted_style_request=False, client_options={"allow_http": True},
        )  # fmt: skip

    def prepare(self) -> None:
        """Nothing is held."""

    def put(self, prompt: int, source: npt.NDArray[np.uint8]) -> None:
        """Store block by block, without a copy of its own."""

        async def one(number: int) -> None:
            name, body = self._place.name(prompt, number), source[number].data
            await obstore.put_async(self._store, name, body, use_multipart=False)

        self._each(len(source), one)

    def get(self, prompt: int, target: npt.NDArray[np.uint8]) -> None:
        """Bring block by block, with one copy of our own."""

        async def one(number: int) -> None:
            answer = await obstore.get_async(self._store, self._place.name(prompt, number))
            target[number] = np.frombuffer(memoryview(await answer.bytes_async()), np.uint8)

        self._each(len(target), one)

    def close(self) -> None:
        """End the loop."""
        self._runner.close()

    def _each(self, count: int, work: Callable[[int], Awaitable[None]]) -> None:
        waiting = iter(range(count))

        async def some() -> None:
            for number in waiting:
                await work(number)

        async def everything() -> None:
            await asyncio.gather(*(some() for _ in range(self._place.concurrency)))

        self._runner.run(everything())

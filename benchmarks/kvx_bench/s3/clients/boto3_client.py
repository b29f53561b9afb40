"""boto3, with everything off that costs time and is not needed, on as many threads as requests."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import boto3
from botocore.config import Config

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from kvx_bench.s3.clients.client import Place


class Boto3Client:
    """One object a block."""

    description = "boto3, one object a block, a thread a request, unsigned payload, no checksums"

    def __init__(self, place: Place) -> None:
        """Start no thread yet."""
        self._place = place
        self._client = boto3.client(
            "s3", endpoint_url=place.url, region_name=place.region,
            config=Config(
                s3={"addressing_style": "path", "payload_signing_enabled": False},
                max_pool_connections=place.concurrency,
                request_checksum_calculation="when_required",
                response_checksum_validation="when_required",
            ),
        )  # fmt: skip
        self._threads = ThreadPoolExecutor(place.concurrency)

    def prepare(self) -> None:
        """Nothing is held."""

    def put(self, prompt: int, source: npt.NDArray[np.uint8]) -> None:
        """Store block by block; it takes bytes, which is a copy."""

        def one(number: int) -> None:
            body = source[number].tobytes()
            self._client.put_object(
                Bucket=self._place.bucket, Key=self._place.name(prompt, number), Body=body
            )

        list(self._threads.map(one, range(len(source))))

    def get(self, prompt: int, target: npt.NDArray[np.uint8]) -> None:
        """Bring block by block, straight into place."""

        def one(number: int) -> None:
            name = self._place.name(prompt, number)
            body = self._client.get_object(Bucket=self._place.bucket, Key=name)["Body"]
            left = target[number].data
            while count := body.readinto(left):
                left = left[count:]
            assert not left, f"{name} is {len(left)} bytes short"

        list(self._threads.map(one, range(len(target))))

    def close(self) -> None:
        """End the threads."""
        self._threads.shutdown()
        self._client.close()

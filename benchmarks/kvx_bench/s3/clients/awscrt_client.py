"""awscrt's own S3 client: the one in C that AWS's tools use."""

from __future__ import annotations

import ctypes
import os
import threading
from typing import TYPE_CHECKING

from awscrt import auth, io, s3
from awscrt.http import HttpHeaders, HttpRequest

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from kvx_bench.s3.clients.client import Place

_GBPS = 100.0


class AwscrtClient:
    """One object a block; bodies are copied into place as their pieces arrive."""

    description = "awscrt's S3Client, one object a block, pieces copied into place"

    def __init__(self, place: Place) -> None:
        """Start a thread a CPU."""
        self._place = place
        bootstrap = bootstrap_of(len(os.sched_getaffinity(0)))
        provider = auth.AwsCredentialsProvider.new_default_chain(bootstrap)
        self._client = s3.S3Client(
            bootstrap=bootstrap,
            region=place.region,
            signing_config=s3.create_default_s3_signing_config(
                region=place.region, credential_provider=provider
            ),
            tls_mode=tls_mode_of(place),
            # No block is cut into parts, and nothing but the concurrency asked for is a limit.
            part_size=max(8 << 20, place.block_bytes),
            multipart_upload_threshold=max(8 << 20, place.block_bytes + 1),
            throughput_target_gbps=_GBPS,
            max_active_connections_override=place.concurrency,
        )

    def prepare(self) -> None:
        """Nothing is held."""

    def put(self, prompt: int, source: npt.NDArray[np.uint8]) -> None:
        """Store block by block; they are read where they lie."""
        self._each([put_request(self._place, prompt, number, row)
                    for number, row in enumerate(source)])  # fmt: skip

    def get(self, prompt: int, target: npt.NDArray[np.uint8]) -> None:
        """Bring block by block."""
        self._each([get_request(self._place, prompt, number, row)
                    for number, row in enumerate(target)])  # fmt: skip

    def close(self) -> None:
        """End with the process."""

    def _each(self, requests: list[dict[str, object]]) -> None:
        free = threading.BoundedSemaphore(self._place.concurrency)
        begun = []
        for request in requests:
            free.acquire()
            one = s3.S3Request(client=self._client, region=self._place.region, **request)
            one.finished_future.add_done_callback(lambda _: free.release())
            begun.append(one.finished_future)
        for future in begun:
            future.result()


class BlockStream:
    """A block as awscrt reads it: from its memory into awscrt's."""

    def __init__(self, row: npt.NDArray[np.uint8]) -> None:
        """Begin at its first byte."""
        self._bytes = row.data
        self._at = 0

    def readinto(self, target: memoryview) -> int:
        """Copy what comes next."""
        count = min(len(target), len(self._bytes) - self._at)
        target[:count] = self._bytes[self._at : self._at + count]
        self._at += count
        return count

    def read(self, size: int = -1) -> bytes:
        """Return a copy of what comes next: awscrt asks for this verb, and uses the other one."""
        left = self._bytes[self._at :]
        found = bytes(left if size < 0 else left[:size])
        self._at += len(found)
        return found

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """Go somewhere else: what is tried again begins again."""
        bases = {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: len(self._bytes)}
        self._at = bases[whence] + offset
        return self._at

    def tell(self) -> int:
        """Return where that is."""
        return self._at


def bootstrap_of(num_threads: int) -> io.ClientBootstrap:
    """Return what connections are made by."""
    group = io.EventLoopGroup(num_threads)
    return io.ClientBootstrap(group, io.DefaultHostResolver(group))


def tls_mode_of(place: Place) -> s3.S3RequestTlsMode:
    """Return whether there is TLS."""
    modes = s3.S3RequestTlsMode
    return modes.ENABLED if place.is_tls else modes.DISABLED


def put_request(
    place: Place, prompt: int, number: int, row: npt.NDArray[np.uint8]
) -> dict[str, object]:
    """Return what stores a block."""
    headers = _headers(place)
    headers.add("Content-Length", str(row.nbytes))
    headers.add("Content-Type", "application/octet-stream")
    request = HttpRequest("PUT", _path(place, prompt, number), headers, BlockStream(row))
    return {"type": s3.S3RequestType.PUT_OBJECT, "request": request}


def get_request(
    place: Place, prompt: int, number: int, row: npt.NDArray[np.uint8]
) -> dict[str, object]:
    """Return what brings a block: in pieces, each of which is copied under the GIL."""
    address = int(row.ctypes.data)

    def take(chunk: bytes, offset: int, **_: object) -> None:
        ctypes.memmove(address + offset, chunk, len(chunk))

    request = HttpRequest("GET", _path(place, prompt, number), _headers(place))
    return {"type": s3.S3RequestType.GET_OBJECT, "request": request, "on_body": take}


def _headers(place: Place) -> HttpHeaders:
    headers = HttpHeaders()
    headers.add("Host", place.authority)
    return headers


def _path(place: Place, prompt: int, number: int) -> str:
    return f"/{place.bucket}/{place.name(prompt, number)}"

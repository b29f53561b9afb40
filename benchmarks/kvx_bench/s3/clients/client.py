"""What somebody does who moves blocks to and from a bucket."""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from collections.abc import Callable

    import numpy as np
    import numpy.typing as npt

_CLIENTS = {
    "kvx": ("kvx_bench.s3.clients.kvx_client", "KvxClient"),
    "obstore": ("kvx_bench.s3.clients.obstore_client", "ObstoreClient"),
    "awscrt": ("kvx_bench.s3.clients.awscrt_client", "AwscrtClient"),
    "boto3": ("kvx_bench.s3.clients.boto3_client", "Boto3Client"),
    "lmcache": ("kvx_bench.s3.clients.lmcache_client", "LmcacheClient"),
}


@dataclass(frozen=True, slots=True)
class Place:
    """Where blocks go, and how; who asks is in the environment, as for any program.

    Attributes:
        url: Of the service, spoken to by path.
        region: As requests are signed for.
        bucket: It is there.
        prefix: What names begin with.
        concurrency: Most requests at a time.
        block_bytes: Of each block.
        capacity_bytes: Of what a cache may keep in host memory.
        folder: For files of a cache; empty for a cache without files.
        deadline_s: Of a cache's calls. Long: what is measured is how fast they are.
        breaker_failures: After how many in a row a cache leaves the bucket alone.
    """

    url: str
    region: str
    bucket: str
    prefix: str
    concurrency: int
    block_bytes: int
    capacity_bytes: int
    folder: str = ""
    deadline_s: float = 120.0
    breaker_failures: int = 3

    @property
    def authority(self) -> str:
        """Return ``host:port`` as the Host header has it."""
        return self.url.partition("://")[2].rstrip("/")

    @property
    def is_tls(self) -> bool:
        """Whether it is spoken to through TLS."""
        return self.url.startswith("https:")

    def name(self, prompt: int, number: int) -> str:
        """Return the name of a block's own object."""
        return f"{self.prefix}/plain/{prompt}/{number}"


class Client(Protocol):
    """Moves prompts, each of which is a set of blocks with a number."""

    @property
    def description(self) -> str:
        """What it does, in one line."""

    def prepare(self) -> None:
        """Forget what is held on this side; not timed."""

    def put(self, prompt: int, source: npt.NDArray[np.uint8]) -> None:
        """Store (n, block_bytes) uint8, all of which is there when this comes back."""

    def get(self, prompt: int, target: npt.NDArray[np.uint8]) -> None:
        """Bring (n, block_bytes) uint8."""

    def close(self) -> None:
        """Let go of everything."""


def open_client(name: str, place: Place) -> Client:
    """Open one by its name.

    Raises:
        ImportError: What it uses is not installed.
    """
    module, kind = _CLIENTS[name]
    made: Callable[[Place], Client] = getattr(import_module(module), kind)
    return made(place)

"""What all measurements of a run share: the server, the bucket, and how clients are started."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from kvx.errors import UnavailableError
from kvx_bench.row import Row
from kvx_bench.s3.clients.client import Place
from kvx_bench.s3.entrant import Entrant
from kvx_bench.transfer.sizes import size_name

if TYPE_CHECKING:
    from collections.abc import Iterator

    from kvx_bench.s3.bucket import Bucket

BASELINES = ("obstore", "awscrt", "boto3", "lmcache")
KVX = "kvx"
_SLACK_BYTES = 64 << 20


@dataclass(frozen=True, slots=True)
class Rig:
    """One run.

    Attributes:
        bucket: Everybody's.
        concurrency: Most requests at a time, of everybody.
        num_blocks: Of a prompt.
        block_bytes: Of a block.
        rounds: How often everybody is measured.
        is_quick: Whether what takes longest is left out.
    """

    bucket: Bucket
    concurrency: int
    num_blocks: int
    block_bytes: int
    rounds: int
    is_quick: bool = False

    @property
    def num_bytes(self) -> int:
        """Of a prompt."""
        return self.num_blocks * self.block_bytes

    @property
    def size(self) -> str:
        """Of a block, as keys of rows have it."""
        return size_name(self.block_bytes)

    def place(self, **changes: object) -> Place:
        """Return where clients work, with what is to be different about it."""
        service = self.bucket.service
        plain = Place(
            service.url, service.region, self.bucket.name, self.bucket.prefix, self.concurrency,
            self.block_bytes, self.num_bytes + _SLACK_BYTES,
        )  # fmt: skip
        return replace(plain, **changes)  # type: ignore[arg-type] # as its attributes are

    def open(self, name: str, place: Place | None = None, *, num_blocks: int = 0) -> Entrant:
        """Start a client.

        Raises:
            UnavailableError: What it uses is not here.
        """
        chosen = self.place() if place is None else place
        return Entrant(name, self.bucket, chosen, num_blocks=num_blocks or self.num_blocks)


@contextlib.contextmanager
def present(rig: Rig, absent: list[Row]) -> Iterator[dict[str, Entrant]]:
    """Start every client that is here; of the others `absent` gets rows that say why."""
    with contextlib.ExitStack() as made:
        found = {}
        for name in (*BASELINES, KVX):
            try:
                found[name] = made.enter_context(rig.open(name))
            except UnavailableError as error:
                absent.append(absent_row(name, error))
        yield found


def absent_row(name: str, error: UnavailableError) -> Row:
    """Return the row of a client that does not take part."""
    key = f"s3.{name}" if name == KVX else f"s3.baseline.{name}"
    return Row(key, note=f"not here because {error}")
